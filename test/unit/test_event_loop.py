"""The loop of one rank beside a peer: what it enters with it, and where it waits when there is nothing to do."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nibble.distributed.communicator import Communicator, SingleRankCommunicator
from nibble.ipc.messages import AbortRequest, FlushCache, NewRequest, TokenBatch, ToRank, Wake
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.sampler import SampledToken, SamplingRow
from nibble.sampling_params import SamplingParams
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.event_loop import EventLoop
from nibble.scheduler.prefill_delayer import RankReport
from nibble.scheduler.scheduler import Scheduler, SchedulerLimits
from nibble.structured_output.store import GrammarStore


def says(rows: int, sequence: int = 1, decodes_only: bool = True, logit_rows: int | None = None) -> RankReport:
    """What the peer reports; all its rows need logits unless it says otherwise."""
    logit_rows = rows if logit_rows is None else logit_rows
    return RankReport(rows, logit_rows, decodes_only, not decodes_only, 0, rows > 0, sequence, 0)


IDLE = says(0, sequence=0)  # a peer without rows that has heard of no request


class Asleep(Exception):
    """The loop waits for a message, and no more will come."""


class FirstOfTwo(SingleRankCommunicator):
    """Rank 0 of two. The peer says what the test scripts, and after that what rank 0 says, without rows of its own."""

    def __init__(self, events: list[str], peer: list[RankReport]) -> None:
        Communicator.__init__(self, rank=0, world_size=2, name="dp")
        self.events, self.peer = events, peer
        self.sent: list[Tensor] = []

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        self.events.append("collective")
        self.sent += [tensor.clone() for tensor in tensors]
        own = RankReport._make(tensors[0][0].tolist())
        peer = self.peer.pop(0) if self.peer else says(0, own.sequence)
        return [torch.cat([tensors[0], torch.tensor([peer])])]


class Rank:
    """An event loop on stand-ins that note what it does. Every token is 7."""

    def __init__(self, inbox: list[list[ToRank]], peer: list[RankReport] | None = None) -> None:
        self.events: list[str] = []
        self.inbox = inbox
        self.group = FirstOfTwo(self.events, peer or [])
        self.sizes: list[tuple[int, ...]] = []
        self.decodes_only: list[bool] = []
        self.logit_rows: list[tuple[int, ...]] = []
        self.sampled: list[int] = []
        self.updates: list[TokenBatch] = []
        limits = SchedulerLimits(4, 8, 4, 64, frozenset({0}))
        scheduler, sync = Scheduler(limits, num_pages=32), DpSync(self.group)
        grammars = GrammarStore(Path("unused"), lambda key, error: None)
        self.loop = EventLoop(0, scheduler, self, sync, self, self.updates.append, grammars)  # type: ignore[arg-type]

    def run(self) -> list[str]:
        """What happens before the loop sleeps for good."""
        with pytest.raises(Asleep):
            self.loop.run_forever()
        return self.events

    def receive(self, wait: bool) -> list[ToRank]:
        if self.inbox:
            return self.inbox.pop(0)
        if wait:
            raise Asleep
        return []

    def launch(
        self,
        batch: ForwardBatch | None,
        rows: Sequence[SamplingRow],
        slots: Sequence[int],
        global_num_tokens: Sequence[int],
        decodes_only: bool,
        global_num_logit_rows: Sequence[int],
    ) -> "Sevens":
        self.decodes_only.append(decodes_only)
        self.logit_rows.append(tuple(global_num_logit_rows))
        self.events.append("forward" if batch else "idle forward")
        self.sizes.append(tuple(global_num_tokens))
        self.sampled.append(len(rows))
        return Sevens(len(rows))


class Sevens:
    def __init__(self, count: int) -> None:
        self.count = count

    def wait(self) -> list[SampledToken]:
        return [SampledToken(7, None)] * self.count


def new_request(sequence: int, prompt: int = 3, max_new_tokens: int = 3) -> NewRequest:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return NewRequest(sequence, f"r{sequence}", list(range(1, prompt + 1)), sampling, 0, False, 0, 1, 0)


def test_an_idle_rank_enters_the_steps_of_its_peers():
    peer = [says(5, decodes_only=False, logit_rows=2), says(1), says(1), says(0)]
    rank = Rank([[Wake(1)]], peer)
    assert rank.run() == ["collective", "idle forward"] * 3 + ["collective"]
    assert rank.sizes == [(0, 5), (0, 1), (0, 1)] and rank.logit_rows == [(0, 2), (0, 1), (0, 1)]
    assert rank.sampled == [0, 0, 0] and rank.updates == []


def test_an_hour_of_silence_is_spent_waiting_for_messages_not_for_a_peer_in_a_collective():
    """A collective has a deadline, and a message has none."""
    assert Rank([]).run() == []
    after_work = Rank([[new_request(1, max_new_tokens=1)]])
    assert after_work.run() == ["collective", "forward", "collective"]


def test_a_message_that_brings_no_work_does_not_lead_a_sleeping_rank_into_a_collective_alone():
    """The abort of a request that has just ended reaches one rank only: the peers sleep on and would not come."""
    assert Rank([[AbortRequest("ended")], [AbortRequest("unknown")]]).run() == []
    after_work = Rank([[new_request(1, max_new_tokens=1)], [], [AbortRequest("r1")], [FlushCache()]])
    assert after_work.run() == ["collective", "forward", "collective"]


def test_no_rank_sleeps_before_its_peer_has_heard_of_the_newest_request():
    rank = Rank([[Wake(1)]], peer=[IDLE, IDLE, says(4, decodes_only=False), says(0)])
    assert rank.run() == ["collective"] * 3 + ["idle forward", "collective"]


def test_ranks_synchronize_once_a_step_by_one_small_message():
    rank = Rank([[new_request(1, prompt=20)]])  # chunks of 8, 8 and 4 tokens, then two more tokens
    assert rank.run() == ["collective", "forward"] * 5 + ["collective"]
    assert [message.nbytes for message in rank.group.sent] == [64] * 6


def test_only_when_every_rank_decodes_is_a_step_one_that_graphs_can_run():
    """Each rank would otherwise choose for itself, and one would replay a graph while the others run eagerly."""
    rank = Rank(
        [[new_request(1, prompt=3, max_new_tokens=5)]], peer=[says(1), says(9, decodes_only=False), says(2), IDLE]
    )
    rank.run()
    assert rank.decodes_only == [False, False, True, True, True]


def test_a_step_that_reaches_no_prompts_end_has_no_logits_to_sample_from():
    rank = Rank([[new_request(1, prompt=20, max_new_tokens=1)]])
    rank.run()
    assert rank.sizes == [(8, 0), (8, 0), (4, 0)] and rank.logit_rows == [(0, 0), (0, 0), (1, 0)]
    assert rank.sampled == [0, 0, 1]
    assert len(rank.updates) == 1


def test_each_update_says_how_much_of_the_prompt_was_cached():
    inbox: list[list[ToRank]] = [[new_request(1, prompt=6, max_new_tokens=1)], [], [new_request(2, prompt=6)]]
    rank = Rank(inbox)
    rank.run()
    assert [batch.updates[0].cached_tokens for batch in rank.updates] == [0, 4, 4, 4]


def test_a_flush_is_done_before_the_next_message_is_read():
    inbox: list[list[ToRank]] = [
        [new_request(1, prompt=6, max_new_tokens=1)],
        [],
        [FlushCache(), new_request(2, prompt=6, max_new_tokens=1)],
    ]
    rank = Rank(inbox)
    rank.run()
    assert [batch.updates[0].cached_tokens for batch in rank.updates] == [0, 0]
