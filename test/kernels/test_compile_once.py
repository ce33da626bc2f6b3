"""Processes that need a kernel at the same time: one compiles it."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nibble.kernels.triton import compile_once

PROGRAM = """
import json, sys
import torch
from triton import knobs
from triton.runtime.driver import driver
import compile_kernels
from nibble.kernels.triton.compile_once import compile_once
from nibble.kernels.triton.peer_sync import mark_kernel

compile_kernels.DRIVER.arch = 90
driver.set_active(compile_kernels.DRIVER)
found = []
knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
compile_once()
print("ready", flush=True)
sys.stdin.readline()
for world_size in (2, 4):
    mark_kernel.warmup(torch.int64, 0, WORLD_SIZE=world_size, num_warps=1, grid=(1,))
print(json.dumps(found))
"""
KERNEL = SimpleNamespace(module="a_module", name="a_kernel")


def test_processes_that_start_together_compile_each_kernel_once(tmp_path: Path) -> None:
    """`cache_hit` is what Triton says of each compilation."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    hits = [json.loads(process.communicate()[0]) for process in processes]
    assert [sorted(of_kernel) for of_kernel in zip(*hits, strict=True)] == [[False, True]] * 2, hits


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield tmp_path
    compile_once._after()


def lock_of_a_kernel(cache: Path) -> int:
    """Another descriptor of it, as another process has."""
    compile_once._before(key="first", fn=KERNEL)
    (lock,) = (cache / "locks").iterdir()
    return os.open(lock, os.O_RDWR)


def test_a_kernel_that_does_not_compile_is_let_go_before_the_next_one(cache: Path) -> None:
    other = lock_of_a_kernel(cache)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    compile_once._before(key="second", fn=KERNEL)  # nothing said that the first one was compiled
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_nobody_waits_for_ever_for_a_process_that_is_stopped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = lock_of_a_kernel(cache)
    compile_once._after()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.setattr(compile_once, "_PATIENCE_S", 0.05)
    start = time.monotonic()
    compile_once._before(key="first", fn=KERNEL)
    assert time.monotonic() - start >= 0.05
    os.close(other)


def test_without_a_folder_to_write_to_each_process_compiles_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    compile_once._before(key="first", fn=KERNEL)
    assert not compile_once._held
