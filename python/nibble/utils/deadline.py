"""Calls that may never return."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def within(timeout_s: float, function: Callable[[], T]) -> T:
    """The result of a function that may never return: TimeoutError then, and its thread ends with the process."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, name="deadline", daemon=True).start()
    return outcome.result(timeout_s)
