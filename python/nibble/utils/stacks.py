"""Has a process write where its threads are, also one that was stopped or spins in C.

In the middle of Python code the stack is now and then not one that can be read, and faulthandler, which reads it from a
signal's C handler, would end the process. So it is asked twice: SIGUSR1 is answered between two steps of the
interpreter, and SIGUSR2 in C, for who does not come to that: it is in C, and its stack stays as it is. Who then gets
there after all writes twice.
"""

import faulthandler
import os
import signal
import time
from pathlib import Path
from types import FrameType

import psutil

_WRITTEN = b"\xff"  # no signal's number
_PATIENCE_SECONDS = 0.5
_POLL_SECONDS = 0.01


def write_stacks_on_signal(written: Path) -> None:
    """SIGUSR1 and SIGUSR2 have the stacks of all threads written to standard error, and then a byte to the file
    `written`. Main thread only.
    """
    file = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)

    def write_now(number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback(all_threads=True)
        os.write(file, _WRITTEN)

    signal.signal(signal.SIGUSR1, write_now)
    signal.signal(signal.SIGUSR2, lambda number, frame: None)
    faulthandler.register(signal.SIGUSR2, chain=True)
    signal.set_wakeup_fd(file)  # Python's C handler, which comes after that of faulthandler, writes the signal's number


def ask_for_stacks(pid: int, written: Path, timeout_s: float) -> bool:
    """Returns once the process has written its stacks, or False when it is gone or was asked in vain.

    One that has not called `write_stacks_on_signal(written)` yet is not asked: the signal would end it.
    """
    if not written.exists():
        return False
    before, deadline = written.stat().st_size, time.monotonic() + timeout_s
    try:
        os.kill(pid, signal.SIGUSR1)
        os.kill(pid, signal.SIGCONT)
        if _waits_for(_WRITTEN, pid, written, before, min(deadline, time.monotonic() + _PATIENCE_SECONDS)):
            return True
        os.kill(pid, signal.SIGUSR2)
    except ProcessLookupError:
        return False
    return _waits_for(_WRITTEN + bytes([signal.SIGUSR2]), pid, written, before, deadline)


def _waits_for(answers: bytes, pid: int, written: Path, before: int, deadline: float) -> bool:
    """Whether one of them comes behind what was written before."""
    while set(answers).isdisjoint(written.read_bytes()[before:]):
        if time.monotonic() > deadline or not _runs(pid):
            return False
        time.sleep(_POLL_SECONDS)
    return True


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
