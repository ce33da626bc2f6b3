"""Tests that measure all of a GPU take turns with the others, whichever worker of pytest-xdist they run in."""

import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))
import gpu_lock
from gpu_lock import gpu_held

SOON = 0.1
LONG = 20.0


@pytest.fixture(autouse=True)
def locks_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_lock, "FOLDER", str(tmp_path))


class Worker:
    """A test that runs in a process of its own, as far as the lock is concerned."""

    def __init__(self, alone):
        self.runs, self.ends = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(alone,), daemon=True)
        self._thread.start()

    def end(self):
        self.ends.set()
        self._thread.join(LONG)

    def _run(self, alone):
        with gpu_held(alone):
            self.runs.set()
            self.ends.wait(LONG)


def test_tests_run_beside_each_other():
    workers = [Worker(alone=False) for _ in range(2)]
    assert all(worker.runs.wait(LONG) for worker in workers)
    for worker in workers:
        worker.end()


def test_two_tests_that_want_the_gpu_alone_at_once_get_it_one_after_the_other():
    workers = [Worker(alone=True), Worker(alone=True)]
    end = time.monotonic() + LONG
    while not any(worker.runs.is_set() for worker in workers) and time.monotonic() < end:
        time.sleep(0.01)
    first, second = sorted(workers, key=lambda worker: not worker.runs.is_set())
    assert first.runs.is_set()
    assert not second.runs.wait(SOON)
    first.end()
    assert second.runs.wait(LONG)
    second.end()


def test_who_wants_the_gpu_alone_waits_for_the_tests_that_run_and_is_not_overtaken():
    running = Worker(alone=False)
    assert running.runs.wait(LONG)
    alone = Worker(alone=True)
    assert not alone.runs.wait(SOON)
    late = Worker(alone=False)
    assert not late.runs.wait(SOON)
    running.end()
    assert alone.runs.wait(LONG)
    assert not late.runs.wait(SOON)
    alone.end()
    assert late.runs.wait(LONG)
    late.end()
