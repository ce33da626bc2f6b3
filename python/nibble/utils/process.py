"""How a process starts another of the same program, and how that one is tied to its life."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import nibble

_PR_SET_PDEATHSIG = 1


def module_command(module: str, *arguments: str) -> list[str]:
    """Runs a module of this program; nothing is imported from the working directory."""
    return [sys.executable, "-P", "-m", module, *arguments]


def module_environment() -> dict[str, str]:
    """This process's environment, in which the module is found first where this one was."""
    package_root = str(Path(nibble.__file__).parents[1])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search_path}


def die_with_parent_thread() -> None:
    """Has the kernel end this process when the thread that started it is gone. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent(pipe: int, finish: Callable[[], None] = lambda: None) -> None:
    """Ends this process at once when its parent is gone, however it went.

    The kernel's parent-death signal covers Linux; the end of `pipe`, whose other end only the parent holds,
    covers every system (`pipe` is its file descriptor). Both act while this process is stuck in a collective.
    A parent that lives and closes the pipe has `finish` called first, in a thread of its own.
    """
    die_with_parent_thread()

    def wait() -> None:
        while os.read(pipe, 4096):
            pass
        try:
            finish()
        finally:
            os._exit(0)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()
