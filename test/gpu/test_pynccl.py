"""PyNCCL with the real library: 1, 2, 4 and 8 ranks that share one GPU, checked against plain torch on the CPU.

Needs NCCL 2.30. Start NVIDIA's Multi-Process Service first, or the ranks' kernels take turns, which takes minutes.
"""

import re
from collections.abc import Iterator

import pytest

import pynccl_ranks as on_rank
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[1, 2, 4, 8], ids="{}-ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    with gpu_ranks(request.param, tmp_path_factory) as processes:
        yield processes


def all_distributions(world_size: int) -> list[list[int]]:
    """Rows per rank: even, few and many; uneven; one rank empty in turn; one rank with everything; all empty."""
    uneven = [3, 1, 6, 2, 9, 4, 130, 5][:world_size]
    one_empty = [[0 if r == empty else rows for r, rows in enumerate(uneven)] for empty in range(world_size)]
    one_full = [[5 if r == full else 0 for r in range(world_size)] for full in range(world_size)]
    return [[4] * world_size, [129] * world_size, uneven, *one_empty, *one_full, [0] * world_size]


# --- What the collectives return


def test_gathers_return_every_ranks_rows_in_rank_order(ranks: RankProcesses) -> None:
    ranks.run(on_rank.check_gathers, distributions=all_distributions(ranks.world_size))


def test_a_list_of_tensors_travels_together(ranks: RankProcesses) -> None:
    ranks.run(on_rank.check_list_gathers, distributions=all_distributions(ranks.world_size))


def test_sums_that_fit_are_exact(ranks: RankProcesses) -> None:
    ranks.run(on_rank.check_exact_sums, distributions=all_distributions(ranks.world_size))


def test_an_all_to_all_returns_every_ranks_rows_for_this_one_in_rank_order(ranks: RankProcesses) -> None:
    ranks.run(on_rank.check_all_to_alls, distributions=all_distributions(ranks.world_size))


@pytest.mark.parametrize("rows", [1, 60])
def test_rounded_sums_are_near_the_sum_in_fp64_and_the_same_on_every_rank(ranks: RankProcesses, rows: int) -> None:
    ranks.run(on_rank.check_rounded_sums, rows=rows)


def test_broadcast_overwrites_every_rank_with_the_source(ranks: RankProcesses) -> None:
    ranks.run(on_rank.check_broadcasts)


def test_ranks_send_and_receive_in_a_ring(ranks: RankProcesses) -> None:
    if ranks.world_size == 1:
        pytest.skip("nobody to send to")
    ranks.run(on_rank.check_ring)


def test_nobody_leaves_a_barrier_before_everybody_has_entered(ranks: RankProcesses) -> None:
    ranks.run(on_rank.check_barriers)


def test_captured_collectives_see_the_inputs_of_each_replay(ranks: RankProcesses) -> None:
    uneven = [7, 0, 3, 1, 20, 2, 0, 5][: ranks.world_size]
    ranks.run(on_rank.check_graphs, distributions=[[8] * ranks.world_size, uneven, [100] * ranks.world_size])


def test_two_groups_in_one_process_do_not_mix(ranks: RankProcesses) -> None:
    if ranks.world_size != 4:
        pytest.skip("a grid of two by two")
    ranks.run(on_rank.use_two_groups)


# --- When something is wrong


def test_wrong_arguments_are_refused_by_name_before_anything_is_launched(ranks: RankProcesses) -> None:
    messages, *_ = ranks.run(on_rank.refusals)
    reasons = [
        "all_gather in group 'shared', rank 0: expected a tensor on cuda:0, got one on cpu",
        "all_gatherv in .*: sizes has",
        "all_gatherv in .*: tensor 0 has 4 rows",
        "reduce_scatterv in .*: x has 4 rows",
        "all_reduce in .*: cannot sum torch.bool",
        "all_gather in .*: expected a contiguous tensor",
        "broadcast in .*: src must be between",
    ]
    assert len(messages) == len(reasons)
    assert all(re.match(reason, message) for reason, message in zip(reasons, messages, strict=True))
