"""Tests that measure all of a GPU take turns with the others, whichever worker of pytest-xdist they run in."""

import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
from gpu_lock import GpuLock

SOON = 0.1
LONG = 20.0


@pytest.fixture(autouse=True)
def locks_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Worker:
    """A test that runs in a process of its own, as far as the lock is concerned."""

    def __init__(self):
        self.test = ExitStack()
        self.lock = GpuLock(self.test)
        self.is_alone = threading.Event()

    def wants_the_gpu_alone(self):
        def wait():
            self.lock.alone()
            self.is_alone.set()

        threading.Thread(target=wait, daemon=True).start()


def test_two_tests_that_want_the_gpu_alone_at_once_get_it_one_after_the_other():
    workers = [Worker(), Worker()]
    for worker in workers:
        worker.wants_the_gpu_alone()
    end = time.monotonic() + LONG
    while not any(worker.is_alone.is_set() for worker in workers) and time.monotonic() < end:
        time.sleep(0.01)
    first, second = sorted(workers, key=lambda worker: not worker.is_alone.is_set())
    assert first.is_alone.is_set()
    assert not second.is_alone.wait(SOON)
    first.test.close()
    assert second.is_alone.wait(LONG)
    second.test.close()


def test_who_wants_the_gpu_alone_waits_for_the_tests_that_run():
    running, alone = Worker(), Worker()
    alone.wants_the_gpu_alone()
    assert not alone.is_alone.wait(SOON)
    running.test.close()
    assert alone.is_alone.wait(LONG)
    alone.test.close()
