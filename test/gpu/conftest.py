"""Tests marked gpu are skipped where there is none. What order they come in, and what they share."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from compile_flashinfer import KINDS
from gpu_lock import gpu_held

WAIT_SECONDS = 400
"""For the compilers, or for those who have the GPU alone."""
LATER = (
    "test_peer_memory.py", "test_peer_hosts_gpu.py", "test_pynccl.py", "test_splits_gpu.py",
    "test_fp4_allgather_gpu.py", "test_cuda_graphs.py", "test_engine_gpu.py", "test_overlap_gpu.py",
    "test_missing_ranks.py", "test_deepseek_gpu.py", "test_launches_gpu.py",
    "test_flashinfer_attention.py", "test_flashinfer_norms.py", "test_flashinfer_mla.py", "test_memory_given_back.py",
)  # fmt: skip
"""They come after all others, in this order. Those behind the first line need FlashInfer, whose compilers take minutes
that the first line fills. Of those the long ones come first, and last the two for which all others wait.
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stress-steps", type=int, default=1000, help="steps of test_peer_memory.py's stress test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.get_closest_marker("gpu"):
            continue
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        own = item.get_closest_marker("timeout")
        item.add_marker(pytest.mark.timeout(WAIT_SECONDS + (own.args[0] if own else 0)), append=False)
    items.sort(key=place)


def needs_flashinfer(item: pytest.Item) -> bool:
    return not {"flashinfer", "gpu_alone"}.isdisjoint(getattr(item, "fixturenames", ()))


def place(item: pytest.Item) -> int:
    """Where it comes. Sorting keeps the order of equal ones."""
    return 1 + LATER.index(item.path.name) if item.path.name in LATER else 0


@pytest.fixture(scope="session", autouse=True)
def share_of_the_machine() -> None:
    """What all workers launch at once must fit on the GPU, or collectives wait for each other for ever; and their
    oracles on the cores.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        os.environ["NCCL_MAX_NCHANNELS"] = str(max(1, 8 // workers))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session", autouse=True)
def flashinfer_compilers(request: pytest.FixtureRequest) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The first worker's run in the background, while the first tests do: it takes minutes, and those that need it come
    later. Others' begin when one of them does, and find everything compiled, or wait for it.
    """
    compilers: list[subprocess.Popen[bytes]] = []
    is_needed = torch.cuda.is_available() and any(map(needs_flashinfer, request.session.items))
    if is_needed:
        if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
            start(compilers)
        os.nice(5)  # everybody waits for the compilers in the end
    yield compilers
    for compiler in compilers:
        with contextlib.suppress(ProcessLookupError):  # it has ended, and what it started as well
            os.killpg(compiler.pid, signal.SIGKILL)
        compiler.wait()


def start(compilers: list[subprocess.Popen[bytes]]) -> None:
    script = str(Path(__file__).with_name("compile_flashinfer.py"))
    for kind in KINDS:
        compilers.append(subprocess.Popen([sys.executable, script, kind], start_new_session=True))


@pytest.fixture(scope="session")
def flashinfer(flashinfer_compilers: list[subprocess.Popen[bytes]]) -> None:
    """Compiled, and no compiler uses the GPU any more. For tests that use it, also in processes of their own."""
    with ExitStack() as stack:
        if not flashinfer_compilers:
            stack.enter_context(gpu_held(alone=False))  # whoever has it alone has it from these, too
            start(flashinfer_compilers)
        assert [compiler.wait() for compiler in flashinfer_compilers] == [0] * len(flashinfer_compilers)


@pytest.fixture(scope="module")
def gpu_alone(flashinfer: None) -> Iterator[None]:
    """No test of another worker uses the GPU while those of this module do, nor does a compiler."""
    with gpu_held(alone=True):
        yield


@pytest.fixture(autouse=True)
def gpu_lock(request: pytest.FixtureRequest) -> Iterator[None]:
    if needs_flashinfer(request.node):
        request.getfixturevalue("flashinfer")  # before: who waits for compilers keeps nobody from the GPU
    if "gpu_alone" in request.fixturenames:
        request.getfixturevalue("gpu_alone")
        yield
    else:
        with gpu_held(alone=False):
            yield
