"""A process whose parent is gone ends, and may finish first what must not be cut off."""

import subprocess
import sys

import pytest

PROGRAM = """
import threading
from nibble.utils.process import die_with_parent

def finish():
    {finish}

die_with_parent(0, finish)
print("alive", flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("finish", "told"), [("print('finished', flush=True)", "finished\n"), ("raise OSError('nothing to finish')", "")]
)
def test_the_end_of_the_pipe_ends_a_process_that_does_not_look_once_it_has_finished(finish, told):
    command = [sys.executable, "-c", PROGRAM.format(finish=finish)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "alive\n"
        process.stdin.close()
        assert process.wait(20) == 0
        assert process.stdout.read() == told
