"""Who may use the GPU meanwhile."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

FOLDER = "/tmp"  # all workers', while the one that `tempfile` names is a worker's own


@contextmanager
def gpu_held(alone: bool) -> Iterator[None]:
    """Workers of pytest-xdist share it. Who wants it `alone` waits for the others, and nobody overtakes who waits."""
    with ExitStack() as stack:
        gate, gpu = (_opened(name, stack) for name in ("gate", "gpu"))
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(gpu, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


def _opened(name: str, stack: ExitStack) -> int:
    file = os.open(f"{FOLDER}/nibble-gpu-tests-{os.getuid()}-{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    stack.callback(os.close, file)
    return file
