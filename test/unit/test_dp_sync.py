"""The message before each step: every rank derives the same from the same reports."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.distributed.communicator import Communicator, SingleRankCommunicator
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.prefill_delayer import DelayLimits, PrefillDelayer, RankReport

DECODE_US, PREFILL_US = 1000, 9000
LIMITS = DelayLimits(max_passes=5, max_ms=1000)


def says(rows: int = 0, sequence: int = 1, ready: int = 0, prefills: bool = False, step_us: int = 0) -> RankReport:
    """A report; with `prefills` the rows are a prompt's, which goes on in the next step."""
    return RankReport(rows, rows, not prefills, prefills, ready, rows > 0 or ready > 0, sequence, step_us)


class LastOf(SingleRankCommunicator):
    """The last rank of a group whose other ranks say what the test says."""

    def __init__(self, *peers: RankReport) -> None:
        Communicator.__init__(self, rank=len(peers), world_size=len(peers) + 1, name="dp")
        self.peers = torch.tensor(peers)

    def _all_gatherv(self, tensors, sizes):
        return [torch.cat([self.peers, tensors[0]])]


def test_a_rank_without_work_takes_part_when_another_has_some():
    result = DpSync(LastOf(says(5), says())).exchange(says())
    assert result.runs and not result.may_sleep
    assert result.global_num_tokens == (5, 0, 0)


def test_a_step_decodes_only_where_every_rank_says_so():
    assert not DpSync(LastOf(says(5, prefills=True), says(1))).exchange(says(2)).decodes_only
    assert DpSync(LastOf(says(5), says())).exchange(says(2)).decodes_only


def test_ranks_sleep_only_when_all_are_idle_and_all_know_the_newest_message():
    """A rank that has read a wake-up must not sleep before the rank that it was about has read its request."""
    behind = DpSync(LastOf(says(sequence=7), says(sequence=6))).exchange(says(sequence=7))
    assert not behind.runs and not behind.may_sleep
    together = DpSync(LastOf(says(sequence=7), says(sequence=7))).exchange(says(sequence=7))
    assert not together.runs and together.may_sleep


def test_nobody_sleeps_while_a_rank_has_requests_that_bring_no_rows_yet():
    result = DpSync(LastOf(says(ready=1), says())).exchange(says())
    assert not result.runs and not result.may_sleep


def test_ranks_of_an_attention_group_speak_for_it_with_one_voice():
    first, second = says(5, prefills=True, step_us=7), says(5, prefills=True, step_us=8)
    result = DpSync(LastOf(first, second, says()), attn_tp_size=2).exchange(says())
    assert (result.global_num_tokens, result.global_num_logit_rows, result.decodes_only) == ((5, 0), (5, 0), False)


@pytest.mark.parametrize("field", [field for field in RankReport._fields if field != "step_us"])
def test_ranks_of_an_attention_group_that_diverge_are_an_error_and_no_hang(field):
    first = says(5)
    other = first._replace(**{field: getattr(first, field) + 1})
    with pytest.raises(RuntimeError, match="diverged"):
        DpSync(LastOf(first, other, says()), attn_tp_size=2).exchange(says())


def test_a_single_rank_sleeps_when_it_has_nothing_to_do():
    sync = DpSync(SingleRankCommunicator("dp"))
    assert sync.exchange(says()).may_sleep
    assert sync.exchange(says(2)).runs


def test_the_message_has_one_size_and_one_place_in_memory():
    sync = DpSync(LastOf(says(), says()))
    own, gathered = sync._own.data_ptr(), sync._all.data_ptr()
    for report in (says(), says(4096, sequence=2**40, ready=99, prefills=True, step_us=10**9)):
        sync.exchange(report)
        assert sync._all[2].tolist() == [int(value) for value in report]
    assert (sync._own.data_ptr(), sync._all.data_ptr()) == (own, gathered)
    assert sync._own.nbytes == 64


# Prefill that is held back


class Ranks:
    """A delayer, and ranks that decode 100 rows each. What the last step took follows from what it was."""

    def __init__(self, count: int = 4, limits: DelayLimits = LIMITS, prefill_us: int = PREFILL_US) -> None:
        self.count, self.prefill_us = count, prefill_us
        self.delayer = PrefillDelayer(count, limits)
        self.last_us = 0

    def step(self, ready: dict[int, int] | None = None, prefilling: set[int] | None = None, rows: int = 100) -> bool:
        """A step in which ranks have requests to admit, and others go on with prompts. May all admit in the next?"""
        ready, prefilling = ready or {}, prefilling or set()
        may_admit = self.delayer.may_admit_next(
            [
                says(rows, ready=ready.get(rank, 0), prefills=rank in prefilling, step_us=self.last_us)
                for rank in range(self.count)
            ]
        )
        self.last_us = self.prefill_us if prefilling else DECODE_US
        return may_admit

    def grow_busy(self) -> None:
        """A rank after the other gets a prompt, all the time, so that it is worth to wait for the next."""
        for number in range(200):
            self.step({number % self.count: 1}, {number % self.count} if number % 2 else set())


def test_admission_waits_for_company_where_prompts_come_often_and_cost_much():
    ranks = Ranks()
    ranks.grow_busy()
    assert not ranks.step()
    assert not ranks.step({0: 1})


def test_when_every_rank_has_something_to_admit_all_do():
    ranks = Ranks()
    ranks.grow_busy()
    ranks.step()
    assert not ranks.step({0: 1})
    assert not ranks.step({0: 1, 2: 1})
    assert ranks.step({0: 1, 1: 1, 2: 1, 3: 1})


def test_where_prompts_come_rarely_and_few_would_wait_for_them_or_cost_little_nobody_waits():
    rare = Ranks()
    for _ in range(3):
        rare.step({0: 1}, {0}, rows=1)
        for _ in range(300):
            assert rare.step(rows=1)
    cheap = Ranks(prefill_us=DECODE_US)
    cheap.grow_busy()
    assert cheap.step({0: 1})


def test_ranks_that_compute_no_row_wait_for_nobody():
    ranks = Ranks()
    ranks.grow_busy()
    assert ranks.step({0: 1}, rows=0)


def test_while_the_prompts_that_were_held_back_go_on_others_join_and_then_no_more():
    """With many ranks one of them is always at a prompt: if that let others in, nobody would ever be held back."""
    ranks = Ranks()
    ranks.grow_busy()
    ranks.step()
    while not ranks.step({0: 1}):
        pass
    assert ranks.step(prefilling={0}), "its prompt takes another step"
    assert not ranks.step(prefilling={3}), "one that joined"


def test_without_ever_a_step_that_only_decodes_prefill_is_held_back_too():
    ranks = Ranks(8)
    for number in range(30):
        may_admit = ranks.step({number % 8: 1}, {number % 8})
    assert not may_admit


def test_holding_back_ends_after_so_many_steps_or_so_much_time():
    for limits, expected in ((DelayLimits(5, 1000), 5), (DelayLimits(100, 3), 4), (DelayLimits(1, 1000), 1)):
        ranks = Ranks(limits=limits)
        ranks.grow_busy()
        assert not ranks.step()
        held = 1
        while not ranks.step({0: 1}):
            held += 1
        assert held == expected


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(
            st.builds(
                says, st.integers(0, 300), st.integers(0, 3), st.integers(0, 5), st.booleans(), st.integers(0, 9999)
            ),
            min_size=3,
            max_size=3,
        ),
        max_size=60,
    )
)
def test_all_ranks_decide_alike_and_hold_nobody_longer_than_the_limit(steps):
    delayers = [PrefillDelayer(3, LIMITS) for _ in range(3)]
    held, may_admit = 0, True
    for reports in steps:
        held = held + 1 if not may_admit and any(report.num_ready for report in reports) else 0
        decisions = {delayer.may_admit_next(reports) for delayer in delayers}
        assert len(decisions) == 1
        (may_admit,) = decisions
        assert held <= LIMITS.max_passes
