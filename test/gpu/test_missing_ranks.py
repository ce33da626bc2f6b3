"""What the others do when a rank does not come: they name it in time, and the GPU stays usable.

Who fails here leaves kernels behind that wait, and under MPS all programs that use the GPU end with those: then look at
this file's failures first.
"""

import re
from collections.abc import Iterator

import pytest

import graph_ranks
import peer_memory_ranks
import pynccl_ranks
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses, free_port

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[2, 4], ids="{}-ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    with gpu_ranks(request.param, tmp_path_factory, timeout_s=170) as processes:
        yield processes


@pytest.mark.parametrize("action", ["eager", "replay"])
def test_a_rank_that_comes_too_late_to_peer_memory_is_named_on_all_ranks(ranks: RankProcesses, action: str) -> None:
    last = ranks.world_size - 1
    messages = ranks.run(peer_memory_ranks.come_too_late, name=f"late-{action}", action=action)
    patience = f"{peer_memory_ranks.LATE_S:g} s"
    expected = f"rank {last} did not arrive within {patience} in a dispatch or combine through peer memory"
    assert messages == [expected] * ranks.world_size, messages


@pytest.mark.parametrize(
    ("action", "first"),
    [
        ("all_gatherv", "all_gatherv in .*: the GPU did not finish it within 1 s; a peer died"),
        ("replay", "synchronize in .*: the GPU did not finish a CUDA graph or other work within 1 s; a peer died"),
    ],
)
def test_a_collective_of_nccl_in_which_a_rank_is_missing_ends_in_an_error(
    ranks: RankProcesses, action: str, first: str
) -> None:
    *waiting, _ = ranks.run(pynccl_ranks.leave_one_out, name=f"silence-{action}", action=action)
    for rank, messages in enumerate(waiting):
        assert re.match(first, messages[0])
        assert messages[1] == f"all_reduce in group 'silence-{action}', rank {rank}: {messages[0]}"


@pytest.mark.usefixtures("flashinfer")
def test_a_rank_that_stays_away_from_a_step_is_named_by_the_others_before_nccl_gives_up(ranks: RankProcesses) -> None:
    *others, away = ranks.run(graph_ranks.miss_the_last_rank)
    missing = f"rank {ranks.world_size - 1} did not arrive within 8 s in a dispatch or combine through peer memory"
    assert away == ""
    assert all(missing in message for message in others), others


@pytest.mark.usefixtures("flashinfer")
def test_where_a_rank_stays_away_its_host_names_it_and_no_host_waits_for_ever(ranks: RankProcesses) -> None:
    """Rank 1 waits for rank 3 of the other host in NCCL, which can't name it, and rank 0 for rank 1."""
    if ranks.world_size != 4:
        pytest.skip("two hosts of two ranks")
    hosts = [{"nnodes": 2, "dist_init_addr": f"127.0.0.1:{free_port() - 1}"} for _ in range(2)]
    on_first_host, in_nccl, on_second_host, away = ranks.run(graph_ranks.miss_the_last_rank, hosts=hosts)
    assert "rank 1 did not arrive within 8 s in a dispatch or combine" in on_first_host
    assert "the GPU did not finish" in in_nccl
    assert "rank 3 did not arrive within 8 s in a dispatch or combine" in on_second_host
    assert away == ""
