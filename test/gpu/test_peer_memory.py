"""Dispatch and combine through peer memory: 2, 4 and 8 ranks that share one GPU, checked against torch on the CPU.

Start NVIDIA's Multi-Process Service first, or the ranks' kernels take turns, which takes minutes.
"""

from collections.abc import Iterator

import pytest

import peer_memory_ranks as on_rank
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=[1, 2, 4, 8], ids="{}-ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    timeout_s = time_limit_s(request.config.getoption("--stress-steps"))
    with gpu_ranks(request.param, tmp_path_factory, timeout_s) as processes:
        yield processes


def time_limit_s(stress_steps: int) -> float:
    """Of one call."""
    return 120 + stress_steps / 200


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The stress test may take as long as its steps need."""
    if "stress_steps" in metafunc.fixturenames:
        steps = metafunc.config.getoption("--stress-steps")
        limit = pytest.mark.timeout(60 + time_limit_s(steps))
        metafunc.parametrize("stress_steps", [pytest.param(steps, marks=limit)], ids="{}-steps".format)


def all_distributions(world_size: int) -> list[list[int]]:
    """Rows per rank: even, few and many; uneven; one rank empty in turn; one rank with everything; all empty."""
    uneven = [3, 1, 6, 2, 9, 4, 130, 5][:world_size]
    one_empty = [[0 if r == empty else rows for r, rows in enumerate(uneven)] for empty in range(world_size)]
    one_full = [[5 if r == full else 0 for r in range(world_size)] for full in (0, world_size - 1)]
    return [[4] * world_size, [129] * world_size, uneven, *one_empty, *one_full, [0] * world_size]


def test_every_rank_gets_the_bytes_of_quantize_pack_of_all_ranks_and_its_rows_of_the_sum(ranks: RankProcesses) -> None:
    ranks.run(on_rank.check_steps, distributions=all_distributions(ranks.world_size))


def test_graphs_and_eager_steps_take_turns_on_changing_inputs(ranks: RankProcesses) -> None:
    uneven = [7, 0, 3, 1, 20, 2, 0, 5][: ranks.world_size]
    ranks.run(on_rank.check_graphs, distributions=[[8] * ranks.world_size, uneven, [100] * ranks.world_size])


def test_results_in_fp8_rows_are_summed_as_the_numbers_that_they_are_in_graphs_and_eager_steps(
    ranks: RankProcesses,
) -> None:
    uneven = [7, 0, 3, 1, 20, 2, 0, 5][: ranks.world_size]
    distributions = [[8] * ranks.world_size, uneven, [0] * (ranks.world_size - 1) + [5]]
    ranks.run(on_rank.check_graphs, distributions=distributions, fp8_partial=True)


def test_sums_are_nearer_to_those_in_fp64_than_nccls_and_than_sums_of_bf16_numbers(ranks: RankProcesses) -> None:
    if ranks.world_size < 4:
        pytest.skip("two numbers are rounded once either way")
    for errors in ranks.run(on_rank.check_closeness, sizes=[16] * ranks.world_size):
        assert errors["peer"] < errors["nccl"], errors
        assert errors["peer"] < 0.8 * errors["chain"], errors


def test_every_row_is_right_in_many_steps_of_random_sizes_with_random_delays(
    ranks: RankProcesses, stress_steps: int
) -> None:
    wrong = ranks.run(on_rank.wrong_values_of_many_steps, steps=stress_steps)
    assert wrong == [[0, 0]] * ranks.world_size, f"wrong bytes of rows, wrong sums on each rank in {stress_steps} steps"
