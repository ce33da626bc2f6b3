"""A process is asked for its stacks, whatever it does."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nibble.utils.stacks import ask_for_stacks

SECONDS = 30.0
AT_WORK = {
    "in Python": "while True: where_it_is()",
    "in C": "sum(range(10**13))",  # one call, which keeps the interpreter for days
    "asleep": "time.sleep(600)",
}


@contextmanager
def process(written: Path, code: str, log: Path) -> Iterator[psutil.Process]:
    """One that has registered, in the middle of `code`."""
    lines = [
        "import sys, threading, time",
        "from pathlib import Path",
        "from nibble.utils.stacks import write_stacks_on_signal",
        "def where_it_is(): pass",
        "for _ in range(50): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        "write_stacks_on_signal(Path(sys.argv[1]))",
        "print(flush=True)",
        code,
    ]
    with log.open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines), str(written)], stdout=subprocess.PIPE, stderr=stderr
        )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield psutil.Process(child.pid)
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("state", ["running", "stopped"])
@pytest.mark.parametrize("code", AT_WORK.values(), ids=AT_WORK)
def test_the_stacks_of_all_threads_are_complete_when_the_answer_comes_and_the_process_goes_on(
    tmp_path: Path, code: str, state: str
) -> None:
    written, log = tmp_path / "written", tmp_path / "log"
    with process(written, code, log) as child:
        for times in (1, 2):
            if state == "stopped":
                child.suspend()
            assert ask_for_stacks(child.pid, written, SECONDS)
            stacks = log.read_text()
            assert stacks.count("most recent call first") >= 51 * times
            assert stacks.count(" in <module>\n") >= times, "the main thread is the last"
            assert child.is_running() and child.status() != psutil.STATUS_STOPPED


def test_one_that_is_amid_python_code_outlives_the_question(tmp_path: Path) -> None:
    """Its stack was read from a C handler, which ended one of some hundred processes that were asked."""
    code = "def total(n): return sum([abs(x) for x in range(n)])\nwhile True: total(5)"
    with process(tmp_path / "written", code, tmp_path / "log") as child:
        for _ in range(100):
            assert ask_for_stacks(child.pid, tmp_path / "written", SECONDS)
        assert signal.SIGUSR2 not in (tmp_path / "written").read_bytes()


def test_one_that_is_not_ready_to_answer_is_left_alone(tmp_path: Path) -> None:
    with process(tmp_path / "written", AT_WORK["asleep"], tmp_path / "log") as child:
        assert not ask_for_stacks(child.pid, tmp_path / "of another", SECONDS)
        assert child.is_running() and (tmp_path / "log").read_text() == ""


def test_one_that_is_gone_keeps_nobody_waiting(tmp_path: Path) -> None:
    """Whether its parent has noticed yet, or not."""
    with process(tmp_path / "written", AT_WORK["asleep"], tmp_path / "log") as child:
        child.kill()
        assert not ask_for_stacks(child.pid, tmp_path / "written", SECONDS)
        child.wait()
        assert not ask_for_stacks(child.pid, tmp_path / "written", SECONDS)
