"""Who may use the GPU meanwhile."""

import fcntl
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path


class GpuLock:
    """Workers of pytest-xdist share the GPU; a test that measures all of it takes it `alone`."""

    def __init__(self, stack: ExitStack) -> None:
        path = f"{tempfile.gettempdir()}/nibble-gpu-tests-{os.getuid()}"
        gate, gpu = (Path(f"{path}-{name}.lock").open("w") for name in ("gate", "gpu"))
        self._gate, self._gpu = stack.enter_context(gate), stack.enter_context(gpu)
        self._take(fcntl.LOCK_SH)

    def alone(self) -> None:
        """Waits for the tests that run, and lets no other one begin before this one's end."""
        self._take(fcntl.LOCK_EX)

    def _take(self, kind: int) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_EX)  # so that nobody overtakes who waits
        fcntl.flock(self._gpu, kind)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
