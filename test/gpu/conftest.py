"""Tests marked gpu are skipped where there is none."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: item.path.name in COMPILED_BY_FLASHINFER)


@pytest.fixture(scope="session", autouse=True)
def flashinfer_compiles_meanwhile() -> Iterator[None]:
    """In the background, while the first tests run: it takes minutes, and the tests that need it come last."""
    if not torch.cuda.is_available():
        yield
        return
    script = str(Path(__file__).with_name("compile_flashinfer.py"))
    compilers = [subprocess.Popen([sys.executable, script, kind]) for kind in ("64", "128", "mla")]
    yield
    for compiler in compilers:
        compiler.kill()
        compiler.wait()
