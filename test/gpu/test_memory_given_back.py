"""What ranks have closed takes no more memory of the GPU. Measured while nothing else uses it, compilers included."""

from collections.abc import Iterator
from types import ModuleType

import pytest

import peer_memory_ranks
import pynccl_ranks
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_alone")]


@pytest.fixture
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    with gpu_ranks(4, tmp_path_factory) as processes:
        yield processes


@pytest.mark.parametrize(
    ("on_rank", "most_mib"),
    [pytest.param(pynccl_ranks, 16, id="NCCL groups"), pytest.param(peer_memory_ranks, 300, id="peer memory")],
)
def test_closing_gives_the_memory_back(ranks: RankProcesses, on_rank: ModuleType, most_mib: int) -> None:
    used, *_ = ranks.run(on_rank.used_memory_after_rejoining, times=4)
    assert used[3] - used[1] < most_mib, f"MiB in use after each time: {used}"
