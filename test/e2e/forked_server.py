"""Servers begin in copies of a process that has imported what they need: that takes longer than the rest of a start."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["nibble.launch_server", "torch", "transformers.models.auto.tokenization_auto", "httpx", "pytest"]
)


class ForkedServer:
    """What tests use of a `subprocess.Popen`. The server has a session of its own."""

    def __init__(self, flags: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        log.write_text("")
        self._process = _CONTEXT.Process(target=_serve, args=(flags, log, environment))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("nibble.launch_server", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(flags: Sequence[str], log: Path, environment: dict[str, str]) -> None:
    """As `python -m nibble.launch_server` does."""
    os.setsid()
    with log.open("a") as stream:
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = flags

    from nibble.launch_server import main

    main()
