"""When a rank counts as stuck."""

from nibble.controller.watchdog import Watchdog
from nibble.ipc.progress import ProgressBoard


def test_a_rank_with_work_that_makes_no_step_for_the_timeout_is_stuck():
    watchdog = Watchdog(num_ranks=2, timeout=3, interval=1)
    assert [watchdog.stuck([seconds, 7], {0, 1}) for seconds in range(1, 6)] == [[], [], [], [1], [1]]


def test_a_rank_without_work_may_rest_and_its_rest_does_not_count_when_work_comes():
    watchdog = Watchdog(num_ranks=1, timeout=3, interval=1)
    assert not any(watchdog.stuck([5], set()) for _ in range(10))
    assert [watchdog.stuck([5], {0}) for _ in range(3)] == [[], [], [0]]


def test_one_step_within_the_timeout_is_enough():
    watchdog = Watchdog(num_ranks=1, timeout=3, interval=1)
    assert not any(watchdog.stuck([second // 2], {0}) for second in range(1, 20))


def test_what_a_rank_counts_is_read_by_others(tmp_path):
    engine, *ranks = (ProgressBoard(tmp_path, 2) for _ in range(3))
    ranks[1].advance(1)
    ranks[1].advance(1)
    ranks[0].advance(0)
    assert engine.read() == [1, 2]
