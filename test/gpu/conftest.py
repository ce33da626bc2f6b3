"""Tests marked gpu are skipped where there is none."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from gpu_lock import GpuLock

COMPILED_BY_FLASHINFER = (
    "test_layer_kernels_gpu.py",
    "test_flashinfer_attention.py",
    "test_cuda_graphs.py",
    "test_engine_gpu.py",
    "test_overlap_gpu.py",
    "test_deepseek_gpu.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress-steps", type=int, default=1000, help="steps of test_peer_memory.py's stress test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.path.name in COMPILED_BY_FLASHINFER:
            item.add_marker(pytest.mark.timeout(400))  # one of them waits for the compilers
    items.sort(key=lambda item: item.path.name in COMPILED_BY_FLASHINFER)


@pytest.fixture(scope="session", autouse=True)
def flashinfer_compilers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """In the background, while the first tests run: it takes minutes, and the tests that need it come last."""
    script = str(Path(__file__).with_name("compile_flashinfer.py"))
    kinds = ("64", "128", "mla") if torch.cuda.is_available() else ()
    compilers = [subprocess.Popen([sys.executable, script, kind]) for kind in kinds]
    yield compilers
    for compiler in compilers:
        compiler.kill()
        compiler.wait()


@pytest.fixture(autouse=True)
def gpu_lock() -> Iterator[GpuLock]:
    with ExitStack() as stack:
        yield GpuLock(stack)


@pytest.fixture(autouse=True)
def flashinfer_is_compiled(request: pytest.FixtureRequest, flashinfer_compilers: list[subprocess.Popen[bytes]]) -> None:
    if request.path.name in COMPILED_BY_FLASHINFER:
        assert [compiler.wait() for compiler in flashinfer_compilers] == [0] * len(flashinfer_compilers)
