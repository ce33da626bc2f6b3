"""Who may use the GPU meanwhile."""

import fcntl
import os
import tempfile
from contextlib import ExitStack


class GpuLock:
    """Workers of pytest-xdist share the GPU; a test that measures all of it takes it `alone`."""

    def __init__(self, stack: ExitStack) -> None:
        """Shared until `stack` ends."""
        self._gate, self._gpu = (_opened(name, stack) for name in ("gate", "gpu"))
        self._take(fcntl.LOCK_SH)

    def alone(self) -> None:
        """Waits for the tests that run, and lets no other one begin before this one's end."""
        self._take(fcntl.LOCK_EX)

    def _take(self, kind: int) -> None:
        fcntl.flock(self._gpu, fcntl.LOCK_UN)  # or two that both want it alone wait for each other's share
        fcntl.flock(self._gate, fcntl.LOCK_EX)  # so that nobody overtakes who waits
        fcntl.flock(self._gpu, kind)
        fcntl.flock(self._gate, fcntl.LOCK_UN)


def _opened(name: str, stack: ExitStack) -> int:
    file = os.open(f"{tempfile.gettempdir()}/nibble-gpu-tests-{os.getuid()}-{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    stack.callback(os.close, file)
    return file
