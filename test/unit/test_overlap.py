"""Steps that overlap: the next one is prepared while the device still runs the last, and nothing else changes."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.distributed.communicator import SingleRankCommunicator
from nibble.ipc.messages import AbortRequest, NewRequest, TokenBatch, ToRank
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.future_tokens import FutureTokens
from nibble.model_executor.sampler import SampledToken, SamplingRow
from nibble.sampling_params import SamplingParams
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.event_loop import EventLoop
from nibble.scheduler.scheduler import PENDING, Scheduler, SchedulerLimits
from nibble.structured_output.store import GrammarStore

PAGE = 4
EOS = 0
VOCAB = 13
CONTEXT = 48

sequence = count(1)


def next_token(tokens: Sequence[int]) -> int:
    """The model: every token that came before decides."""
    state = 17
    for token in tokens:
        state = (state * 31 + token + 1) % 1009
    return state % VOCAB


def answer_to(prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and (len(tokens) == len(prompt) or tokens[-1] != EOS):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Device:
    """Runs steps in the order in which it was given them, and not before somebody waits for one."""

    def __init__(self, num_pages: int, num_slots: int, events: list[str]) -> None:
        self.memory = [-1] * (num_pages * PAGE)
        self.future = FutureTokens(num_slots, torch.device("cpu"))
        self.queue: list[Step | Clear] = []
        self.events = events
        self.num_launched = 0
        self.num_rows = 0

    def clear_pages(self, pages: Sequence[int]) -> None:
        self.queue.append(Clear(self, pages))

    def launch(self, batch, rows: Sequence[SamplingRow], slots, sizes, decodes_only, logit_rows) -> "Step":
        for row in rows:
            assert not row.sampling.has_penalties or PENDING not in row.token_ids, "penalties count what there is"
        step = Step(self, self.num_launched, batch, list(slots))
        self.num_launched += 1
        self.queue.append(step)
        self.events.append(f"launch {step.number}")
        return step

    def run_until(self, step: "Step") -> None:
        while step.token_ids is None:
            self.queue.pop(0).run()


class Clear:
    def __init__(self, device: Device, pages: Sequence[int]) -> None:
        self.device, self.pages = device, pages

    def run(self) -> None:
        for page in self.pages:
            self.device.memory[page * PAGE : (page + 1) * PAGE] = [-1] * PAGE


class Step:
    def __init__(self, device: Device, number: int, batch: ForwardBatch | None, slots: list[int]) -> None:
        self.device, self.number, self.slots = device, number, slots
        self.batch = batch
        self.tables = [list(table) for table in batch.attention.page_tables] if batch else []
        self.token_ids: list[int] | None = None

    def run(self) -> None:
        """Writes the tokens themselves as keys, and reads those of all tokens before."""
        self.token_ids = []
        if self.batch is None:
            return
        memory, attention = self.device.memory, self.batch.attention
        input_ids = self.device.future.resolve(torch.tensor(self.batch.input_ids)).tolist()
        self.device.num_rows += len(input_ids)
        row = 0
        for queries, length, table in zip(attention.query_lens, attention.seq_lens, self.tables, strict=True):
            slots = [page * PAGE + offset for page in table for offset in range(PAGE)][:length]
            for slot in slots[length - queries :]:
                memory[slot] = input_ids[row]
                row += 1
            if row - 1 in self.batch.logit_rows:
                self.token_ids.append(next_token([memory[slot] for slot in slots]))
        if self.slots:
            self.device.future.store(torch.tensor(self.slots), torch.tensor(self.token_ids))

    def wait(self) -> list[SampledToken]:
        self.device.events.append(f"wait {self.number}")
        self.device.run_until(self)
        return [SampledToken(token, None) for token in self.token_ids]


class Asleep(Exception):
    """The loop waits for a message, and no more will come."""


class Rank:
    def __init__(self, overlaps: bool = True, num_pages: int = 64, max_running: int = 4, budget: int = 8) -> None:
        self.events: list[str] = []
        self.answers: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.device = Device(num_pages, max_running, self.events)
        limits = SchedulerLimits(PAGE, budget, max_running, CONTEXT, frozenset({EOS}))
        self.scheduler = Scheduler(limits, num_pages)
        sync = DpSync(SingleRankCommunicator("dp"))
        grammars = GrammarStore(Path("unused"), lambda key, error: None)
        self.loop = EventLoop(0, self.scheduler, self.device, sync, self, self.note, grammars, overlaps=overlaps)
        self.inbox: list[list[ToRank]] = []

    def receive(self, wait: bool) -> list[ToRank]:
        if not self.inbox and wait:
            raise Asleep
        return self.inbox.pop(0) if self.inbox else []

    def note(self, batch: TokenBatch) -> None:
        for update in batch.updates:
            assert update.request_id not in self.reasons, "nothing is told of a request that has ended"
            self.answers.setdefault(update.request_id, []).extend(update.token_ids)
            if update.finish_reason is not None:
                self.reasons[update.request_id] = update.finish_reason.type

    def run(self, *inbox: list[ToRank]) -> None:
        """One list of messages a step, and then nothing any more."""
        self.inbox += inbox
        with pytest.raises(Asleep):
            self.loop.run_forever()
        self.scheduler.check_idle()


def new_request(name: str, prompt: Sequence[int], max_new_tokens: int, **sampling: float) -> NewRequest:
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)
    return NewRequest(next(sequence), name, list(prompt), params, 0, False, 0, 1, 0)


def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_waited_for():
    rank = Rank()
    rank.run([new_request("a", [1, 2, 3], 3)])
    assert rank.events == ["launch 0", "launch 1", "wait 0", "launch 2", "wait 1", "wait 2"]
    assert rank.answers["a"] == answer_to([1, 2, 3], 3)


def test_without_overlap_every_step_is_waited_for_at_once():
    rank = Rank(overlaps=False)
    rank.run([new_request("a", [1, 2, 3], 2)])
    assert rank.events == ["launch 0", "wait 0", "launch 1", "wait 1"]


def test_a_request_that_ends_at_its_length_wastes_no_row_and_one_that_stops_wastes_one():
    stopping = next(p for p in range(1000) if len(answer_to([p % VOCAB, p // VOCAB % VOCAB], 9)) == 4)
    prompt = [stopping % VOCAB, stopping // VOCAB % VOCAB]
    for max_new_tokens, wasted in ((3, 0), (9, 1)):
        rows = {}
        for overlaps in (False, True):
            rank = Rank(overlaps)
            rank.run([new_request("a", prompt, max_new_tokens)])
            assert rank.answers["a"] == answer_to(prompt, max_new_tokens)
            rows[overlaps] = rank.device.num_rows
        assert rows[True] - rows[False] == wasted


def test_a_request_with_penalties_waits_for_its_last_token_and_only_then_goes_on():
    rank = Rank()
    rank.run([new_request("a", [1, 2, 3], 3, frequency_penalty=1.0)])
    assert rank.events == ["launch 0", "wait 0", "launch 1", "wait 1", "launch 2", "wait 2"]


def test_what_was_aborted_while_a_step_ran_leaves_pages_and_slots_behind_it():
    rank = Rank()
    rank.run([new_request("a", [1, 2, 3], 30), new_request("b", [4, 5], 5)], [], [AbortRequest("a")])
    assert rank.answers["b"] == answer_to([4, 5], 5)
    assert "a" not in rank.reasons


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 3), min_size=1, max_size=20),
        st.integers(1, 20),
        st.sampled_from([0.0, 0.0, 0.0, 1.0]),  # a penalty
        st.integers(0, 12),  # the step in which it comes
        st.sampled_from([None, None, None, 1, 5]),  # steps until it is aborted
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(REQUESTS, st.sampled_from([12, 14, 64]), st.sampled_from([3, 8, 64]))
def test_every_request_gets_its_own_answer_whatever_runs_ends_or_is_retracted_beside_it(requests, num_pages, budget):
    for overlaps in (False, True):
        rank = Rank(overlaps, num_pages, budget=budget)
        inbox: list[list[ToRank]] = [[] for _ in range(20)]
        for number, (prompt, length, penalty, step, abort) in enumerate(requests):
            inbox[step].append(new_request(f"r{number}", prompt, length, frequency_penalty=penalty))
            if abort is not None:
                inbox[step + abort].append(AbortRequest(f"r{number}"))
        first = next(index for index, messages in enumerate(inbox) if messages)
        rank.run(*[messages for messages in inbox[first:] if messages])
        for number, (prompt, length, _, _, abort) in enumerate(requests):
            got, expected = rank.answers.get(f"r{number}", []), answer_to(prompt, length)
            assert got == expected[: len(got)]
            assert got == expected or abort is not None
