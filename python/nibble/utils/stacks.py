"""Has a process write where its threads are, also one that was stopped or spins in C."""

import faulthandler
import os
import signal
import time
from pathlib import Path

import psutil

_POLL_SECONDS = 0.01


def write_stacks_on_signal(written: Path) -> None:
    """SIGUSR1 has the stacks of all threads written to standard error, and then a byte to the file `written`.

    Both from the C handlers of faulthandler and of Python, which need no interpreter that gets on. Main thread only.
    """
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    faulthandler.register(signal.SIGUSR1, chain=True)
    signal.set_wakeup_fd(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600))


def ask_for_stacks(pid: int, written: Path, timeout_s: float) -> bool:
    """Returns once the process has written its stacks, or False when it is gone or was asked in vain.

    One that has not called `write_stacks_on_signal(written)` yet is not asked: the signal would end it.
    """
    if not written.exists():
        return False
    before, deadline = written.stat().st_size, time.monotonic() + timeout_s
    try:
        for number in (signal.SIGUSR1, signal.SIGCONT):
            os.kill(pid, number)
    except ProcessLookupError:
        return False
    while written.stat().st_size == before:
        if time.monotonic() > deadline or not _runs(pid):
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
