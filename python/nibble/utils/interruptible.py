"""Work in a thread that another thread can end."""

import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Interrupted(BaseException):
    """Raised inside the work; no `except Exception` of its own stops it."""


class Interruptible(Generic[T]):
    """Runs `work` once. `interrupt` ends it between two bytecodes: a single call into C is waited for."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._thread: int | None = None
        """While the work runs."""

    def run(self) -> T:
        self._thread = threading.get_ident()
        try:
            return self._work()
        finally:
            with self._lock:
                _raise_in_thread(self._thread, None)  # an interruption that came too late must not hit what follows
                self._thread = None

    def interrupt(self) -> None:
        """To be called from another thread; does nothing before the work has begun or when it has ended."""
        with self._lock:
            if self._thread is not None:
                _raise_in_thread(self._thread, Interrupted)


def _raise_in_thread(thread: int, error: type[BaseException] | None) -> None:
    """None takes back what has not been raised yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )
