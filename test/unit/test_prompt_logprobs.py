"""Log-probabilities of prompts: each token's once and in order, however its prompt is cut, cached or retracted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fake_engine import CHAT, COMPLETIONS, Api, FakeEngine, parrot
from nibble.distributed.communicator import SingleRankCommunicator
from nibble.ipc.messages import NewRequest, TokenBatch, ToRank
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.future_tokens import FutureTokens
from nibble.model_executor.model_runner import StepOutput
from nibble.model_executor.sampler import Sampler
from nibble.model_executor.step_executor import StepExecutor
from nibble.sampling_params import SamplingParams
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.event_loop import EventLoop
from nibble.scheduler.scheduler import Scheduler, SchedulerLimits
from nibble.structured_output.store import GrammarStore
from test_http_openai import complete
from tiny_tokenizer import tiny_tokenizer

VOCAB = 50
EOS = 0


class Done(Exception):
    pass


def logits_at(position: int, token: int) -> Tensor:
    """What the model says after `token` at `position`: the likeliest next one is 7 steps on."""
    row = torch.linspace(0, 3, VOCAB).roll(position)
    row[(token * 3 + 7) % VOCAB] += 2
    return row


class Rank:
    """An event loop over that model, which notes the tokens it computes."""

    def __init__(self, requests: Sequence[NewRequest], **limits: Any) -> None:
        self.inbox: list[list[ToRank]] = [[request] for request in requests]
        self.computed = 0
        self.future_tokens = FutureTokens(4, torch.device("cpu"))
        self.found: dict[str, list[Any]] = {request.request_id: [] for request in requests}
        self.ended: dict[str, Any] = {}
        overlaps = limits.pop("overlaps", False)
        scheduler = Scheduler(
            SchedulerLimits(4, limits.pop("budget", 8), 4, 64, frozenset({EOS}), **limits), num_pages=16
        )
        sync = DpSync(SingleRankCommunicator("dp"))
        grammars = GrammarStore(Path("unused"), lambda key, error: None)
        executor = StepExecutor(self, Sampler([EOS]))  # type: ignore[arg-type]
        self.loop = EventLoop(0, scheduler, executor, sync, self, self.note, grammars, overlaps=overlaps)

    def run(self) -> "Rank":
        with pytest.raises(Done):
            self.loop.run_forever()
        assert self.loop.scheduler.is_idle
        return self

    def receive(self, wait: bool) -> list[ToRank]:
        if self.inbox:
            return self.inbox.pop(0)
        if wait:
            raise Done
        return []

    def run_step(
        self, batch: ForwardBatch | None, slots: Sequence[int], sizes: Any, decodes_only: bool, logit_sizes: Any
    ) -> StepOutput:
        assert batch is not None and logit_sizes == (len(batch.logit_rows),)
        self.computed += len(batch.input_ids)
        input_ids = self.future_tokens.resolve(torch.tensor(batch.input_ids)).tolist()
        rows = [logits_at(batch.positions[row], input_ids[row]) for row in batch.logit_rows]
        return StepOutput(torch.stack(rows) if rows else torch.empty(0, VOCAB))

    def record_event(self) -> None:
        pass

    def synchronize(self, event: None) -> None:
        pass

    def note(self, batch: TokenBatch) -> None:
        for update in batch.updates:
            self.found[update.request_id] += update.prompt_logprobs
            if update.finish_reason is not None:
                self.ended[update.request_id] = (update.finish_reason, update.token_ids)


def request(
    number: int, prompt: Sequence[int], start: int | None, max_new_tokens: int = 2, named: tuple[int, ...] = ()
) -> NewRequest:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=True)
    return NewRequest(number, f"r{number}", list(prompt), sampling, 0, True, 2, 1, 0, named, start)


def expected(prompt: Sequence[int], start: int) -> list[float]:
    rows = [logits_at(position, prompt[position]) for position in range(start, len(prompt) - 1)]
    return [float(row.log_softmax(0)[token]) for row, token in zip(rows, prompt[start + 1 :], strict=True)]


def check(rank: Rank, sent: NewRequest) -> None:
    found = rank.found[sent.request_id]
    if sent.logprob_start_len is None:
        assert found == []
        return
    assert [entry.token_id for entry in found] == sent.input_ids[sent.logprob_start_len + 1 :]
    assert [entry.logprob for entry in found] == pytest.approx(expected(sent.input_ids, sent.logprob_start_len))


PROMPTS = st.lists(st.integers(1, 3), min_size=1, max_size=30)


@given(
    prompts=st.lists(st.tuples(PROMPTS, st.none() | st.integers(0, 29), st.sampled_from([0, 1, 12])), max_size=5),
    budget=st.integers(1, 12),
    reuse=st.booleans(),
    overlaps=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_every_wanted_token_of_a_prompt_is_scored_once_and_in_order(prompts, budget, reuse, overlaps):
    """Few tokens and few pages: beginnings are shared, and requests are retracted."""
    requests = [
        request(number, prompt, None if start is None else start % len(prompt), limit)
        for number, (prompt, start, limit) in enumerate(prompts, 1)
    ]
    rank = Rank(requests, budget=budget, reuse_prefixes=reuse, overlaps=overlaps).run()
    for sent in requests:
        check(rank, sent)
        assert len(rank.ended) == len(requests)


def test_what_is_cached_is_computed_again_from_where_it_is_scored():
    prompt = list(range(1, 21))
    first, whole, end, none = (request(i, prompt, start, 1) for i, start in enumerate((None, 0, 13, None), 1))
    rank = Rank([first])
    for sent, computed in ((first, 20), (whole, 20), (end, 20 - 12), (none, 20 - 16)):
        rank.inbox, before = [[sent]], rank.computed
        rank.found.setdefault(sent.request_id, [])
        rank.run()
        assert rank.computed - before == computed
        check(rank, sent)


def test_likeliest_and_named_tokens_come_with_each_score():
    rank = Rank([request(1, [3, 4, 5], 0, named=(9, 2))]).run()
    rows = [logits_at(0, 3).log_softmax(0), logits_at(1, 4).log_softmax(0)]
    for entry, row in zip(rank.found["r1"], rows, strict=True):
        best = row.topk(2)
        assert entry.top == tuple(zip(best.values.tolist(), best.indices.tolist(), strict=True))
        assert entry.named == tuple(zip(row[[9, 2]].tolist(), (9, 2), strict=True))


def test_a_request_for_no_tokens_is_scored_and_ends_at_once():
    rank = Rank([request(1, list(range(1, 20)), 0, max_new_tokens=0)]).run()
    reason, token_ids = rank.ended["r1"]
    assert (reason.type, reason.length, token_ids) == ("length", 0, [])
    check(rank, request(1, list(range(1, 20)), 0))


# Over HTTP

TOKENIZER = tiny_tokenizer()
PROMPT = "Hello, 世界!"
PROMPT_IDS = TOKENIZER.encode(PROMPT)


def native(start: int | None = 0, **fields: Any) -> dict[str, Any]:
    asked = {} if start is None else {"logprob_start_len": start}
    body = {"text": PROMPT, "return_logprob": True, "sampling_params": {"max_new_tokens": 2}, **asked, **fields}
    result: dict[str, Any] = Api().result("/generate", body)["meta_info"]
    return result


@pytest.mark.parametrize("start", [0, 3, len(PROMPT_IDS) - 1])
def test_native_answers_list_the_prompt_from_the_token_asked_for_the_first_without_a_logprob(start):
    meta_info = native(start, top_logprobs_num=2, token_ids_logprob=[5, 6])
    tokens = meta_info["input_token_logprobs"]
    assert tokens == [[None if i == 0 else -0.5, token, None] for i, token in enumerate(PROMPT_IDS[start:])]
    for field, width in (("input_top_logprobs", 2), ("input_token_ids_logprobs", 2)):
        first, *others = meta_info[field]
        assert first is None and [len(other) for other in others] == [width] * (len(tokens) - 1)
    assert meta_info["output_token_ids_logprobs"] == [[[-3.0, 5, None], [-3.0, 6, None]]] * 2
    assert len(meta_info["output_token_logprobs"]) == 2


def test_without_asking_the_prompt_has_no_logprobs():
    for start in (None, -1):
        assert native(start)["input_token_logprobs"] == []
    assert "input_top_logprobs" not in native(0)


def test_streamed_native_answers_have_the_prompts_logprobs_in_every_chunk():
    body = {"text": PROMPT, "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 1}
    events = Api().events("/generate", body)
    assert {len(event["meta_info"]["input_token_logprobs"]) for event in events} == {len(PROMPT_IDS)}
    assert [len(event["meta_info"]["output_top_logprobs"]) for event in events] == list(range(1, len(events) + 1))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_with_logprobs_begins_with_the_prompts(stream, max_tokens):
    """What lm-eval's local-completions asks of a server for loglikelihoods."""
    answer = complete(
        Api(FakeEngine(parrot)), prompt=PROMPT_IDS, echo=True, logprobs=1, max_tokens=max_tokens, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    fields = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    tokens, logprobs, tops, offsets = (
        [entry for choice in choices for entry in getattr(choice.logprobs, field)] for field in fields
    )
    assert len(tokens) == len(PROMPT_IDS) + max_tokens
    assert logprobs == [None] + [-0.5] * (len(tokens) - 1)
    assert tops == [None] + [{token: -0.5} for token in tokens[1:]]
    text = "".join(choice.text for choice in choices)
    assert text == PROMPT + TOKENIZER.decode(PROMPT_IDS[:max_tokens])
    assert all(
        text[offset:].startswith(token)
        for token, offset in zip(tokens, offsets, strict=True)
        if not token.startswith("bytes:")
    )


def test_the_best_of_several_are_those_with_the_likeliest_tokens():
    class Varied(FakeEngine):
        def _logprob(self, token: int, request: Any) -> Any:
            likeliness = {0: -3.0, 1: -1.0, 2: -2.0}[request.sampling.sampling_seed % 3]
            return type(super()._logprob(token, request))(likeliness, token)

    letters = TOKENIZER.encode("a") + TOKENIZER.encode("b") + TOKENIZER.encode("c")
    engine = Varied(lambda request: [letters[request.sampling.sampling_seed % 3]] * 4)
    answer = complete(Api(engine), n=2, best_of=3, seed=3, max_tokens=4)
    assert [choice.text for choice in answer.choices] == ["bbbb", "cccc"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is None, "which were not asked for"
    assert answer.usage.completion_tokens == 12, "all that were generated"


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/generate", {"logprob_start_len": len(PROMPT_IDS)}, "logprob_start_len", f"less than the {len(PROMPT_IDS)}"),
        ("/generate", {"logprob_start_len": -2}, "logprob_start_len", "-1"),
        ("/generate", {"token_ids_logprob": [10**6]}, "token_ids_logprob", "vocabulary"),
        ("/generate", {"token_ids_logprob": [1] * 1025}, "token_ids_logprob", "1024"),
        (COMPLETIONS, {"n": 3, "best_of": 2}, "best_of", "at least n"),
        (COMPLETIONS, {"best_of": 2, "stream": True}, "best_of", "streamed"),
        (COMPLETIONS, {"best_of": 1000}, "best_of", "128"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "at least 1"),
    ],
)
def test_what_can_not_be_given_is_refused(path, fields, param, message):
    smallest = {
        "/generate": {"text": PROMPT, "return_logprob": True},
        COMPLETIONS: {"prompt": PROMPT},
        CHAT: {"messages": [{"role": "user", "content": "x"}]},
    }
    error = Api().error(path, smallest[path] | fields)
    assert (error["param"], message in error["message"].replace("greater than or equal to", "at least")) == (
        param,
        True,
    )
