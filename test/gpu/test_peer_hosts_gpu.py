"""Peer memory inside several hosts and NCCL between them: ranks that share one GPU play the hosts.

Start NVIDIA's Multi-Process Service first, or the ranks' kernels take turns, which takes minutes.
"""

from collections.abc import Iterator

import pytest

import peer_hosts_ranks as on_rank
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses

pytestmark = pytest.mark.gpu

HOSTS = pytest.mark.parametrize(("ranks", "num_hosts"), [(4, 2), (8, 2), (8, 4)], indirect=["ranks"])


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    with gpu_ranks(request.param, tmp_path_factory, timeout_s=120) as processes:
        yield processes


def distributions(ranks: int) -> list[list[int]]:
    """Rows per rank: even, few and many; uneven; a host, or a rail of two hosts, without any; one rank with all."""
    uneven = [3, 1, 6, 2, 9, 4, 130, 5][:ranks]
    no_host = [0] * (ranks // 2) + uneven[ranks // 2 :]
    no_rail = [0 if rank % (ranks // 2) == 0 else rows for rank, rows in enumerate(uneven)]
    last = [0] * (ranks - 1) + [5]
    return [[4] * ranks, [129] * ranks, uneven, no_host, no_rail, last]


@HOSTS
def test_every_rank_gets_the_bytes_of_all_ranks_and_its_rows_of_the_sum_in_eager_steps_and_graphs(
    ranks: RankProcesses, num_hosts: int
) -> None:
    ranks.run(on_rank.check_steps, num_hosts=num_hosts, distributions=distributions(ranks.world_size))


@pytest.mark.parametrize(("ranks", "num_hosts"), [(4, 2)], indirect=["ranks"])
def test_fp8_rows_are_summed_inside_a_host_and_bf16_between_hosts(ranks: RankProcesses, num_hosts: int) -> None:
    ranks.run(on_rank.check_steps, num_hosts=num_hosts, distributions=[[8] * 4, [0, 3, 7, 1]], fp8_partial=True)


@pytest.mark.parametrize(("ranks", "num_hosts"), [(8, 2)], indirect=["ranks"])
def test_sums_are_nearer_to_those_in_fp64_than_nccls_and_than_sums_of_bf16_numbers(
    ranks: RankProcesses, num_hosts: int
) -> None:
    for errors in ranks.run(on_rank.errors_of_sums, num_hosts=num_hosts, sizes=[16] * ranks.world_size):
        assert errors["hosts"] < errors["nccl"], errors
        assert errors["hosts"] < 0.8 * errors["chain"], errors
