"""Answers are held to their grammar, token by token, whatever the model would rather say."""

import json
import re
import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from grammar_cases import EOS, TOKENIZER, VOCAB, begin, compiler, write_vocabulary
from nibble.generation import FinishReason
from nibble.ipc.messages import NewRequest
from nibble.model_executor.logprobs import LogprobsWanted
from nibble.model_executor.sampler import Sampler, SamplingRow
from nibble.sampling_params import SamplingParams
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import PENDING, Scheduler, SchedulerLimits
from nibble.structured_output.compiler import GrammarError
from nibble.structured_output.grammar import (
    MAX_GRAMMAR_BYTES,
    ebnf_format,
    json_schema_format,
    make_grammar,
    optional_format,
    regex_format,
    sequence_format,
    tag_format,
    text_format,
)
from nibble.structured_output.state import GrammarState
from nibble.structured_output.store import GrammarStore
from nibble.utils.errors import RequestError

SAMPLER = Sampler([EOS])
TO_THE_END = (EOS, *(TOKENIZER.encode(mark)[0] for mark in '"]}'))
ANY_TEXT = regex_format("[a-z]*")
GREEDY = SamplingParams(temperature=0.0)


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str
    age: int
    tags: list[bool]


def answer(
    grammar: GrammarState, sampling: SamplingParams, limit: int = 400, seed: int = 0, boost: Sequence[int] = (EOS,)
) -> str:
    """What a model says that wants the tokens `boost` most of all, and otherwise anything."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [1]
    for _ in range(limit):
        logits = torch.randn(1, VOCAB, generator=generator)
        logits[0, list(boost)] += 9
        (sampled,) = SAMPLER.sample(logits, [SamplingRow(sampling, seed, tokens, 1, None, grammar)])
        assert sampled.token_id is not None
        tokens.append(sampled.token_id)
        assert grammar.accept(sampled.token_id), "only what is allowed is sampled"
        if grammar.has_ended:
            assert tokens.pop() == EOS
            break
    return TOKENIZER.decode(tokens[1:])


SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=2.0, top_k=3),
    SamplingParams(temperature=1.0, top_p=0.2, min_p=0.1),
    SamplingParams(temperature=1.0, frequency_penalty=2.0, logit_bias={EOS: 100.0}),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "top_k", "top_p", "penalties"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_every_answer_fits_its_regex_however_it_is_sampled(sampling, seed):
    pattern = r"(yes|no|maybe), [a-f]{2,4}( [0-9]+){1,2}\."
    assert re.fullmatch(pattern, answer(begin(regex_format(pattern)), sampling, seed=seed))


@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_every_answer_fits_its_schema(seed):
    grammar = begin(json_schema_format(Person.model_json_schema()))
    text = answer(grammar, SamplingParams(temperature=1.0), seed=seed, boost=TO_THE_END)
    Person.model_validate_json(text)


def test_an_object_of_any_kind_is_json():
    for seed in range(5):
        grammar = begin(json_schema_format({"type": "object"}))
        text = answer(grammar, SamplingParams(temperature=1.0), seed=seed, boost=TO_THE_END)
        assert isinstance(json.loads(text), dict)


def test_every_answer_is_of_its_grammar():
    grammar = 'root ::= list\nlist ::= "[" (item ("," item)*)? "]"\nitem ::= [0-9] | list'
    for seed in range(5):
        json.loads(answer(begin(ebnf_format(grammar)), SamplingParams(temperature=1.0), seed=seed))


def test_the_end_comes_only_where_the_grammar_allows_it():
    """The model wants nothing but to stop."""
    assert answer(begin(regex_format("[0-9]{3}[0-9]*")), GREEDY).isdigit()
    assert len(answer(begin(regex_format("[0-9]{3}[0-9]*")), GREEDY)) == 3
    assert answer(begin(ANY_TEXT), GREEDY) == ""


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0.0, ignore_eos=True), SamplingParams(min_new_tokens=9)]
)
def test_an_answer_that_shall_go_on_ends_when_nothing_else_is_allowed(sampling):
    assert len(answer(begin(regex_format("[a-z]{5}")), sampling)) >= 5
    tokens = TOKENIZER.encode(answer(begin(regex_format("[a-z]*")), sampling, limit=20))
    assert len(tokens) >= 9, "as long as something else is allowed, it goes on"


def test_a_stop_token_that_shall_not_come_yet_gives_way_too():
    stop = TOKENIZER.encode("a")[0]
    sampling = SamplingParams(temperature=0.0, min_new_tokens=5, stop_token_ids=(stop,))
    assert answer(begin(regex_format("a|b")), sampling, boost=[stop]) == "b"
    assert answer(begin(regex_format("a")), sampling, boost=[stop]) == "a"


def test_a_text_goes_before_the_format_where_the_format_says_so():
    thinking = optional_format(tag_format("<think>", text_format(), "</think>"))
    content = sequence_format([thinking, json_schema_format({"type": "object"})])
    state = begin(content)
    for token in TOKENIZER.encode("<think>let me { see </think>{}"):
        assert state.accept(token)
    assert state.accept(EOS) and state.has_ended
    assert not begin(content).accept(TOKENIZER.encode("hello")[0])


def test_rows_without_a_grammar_are_left_alone():
    logits = torch.randn(3, VOCAB)
    rows = [
        SamplingRow(GREEDY, 0, [], 0, LogprobsWanted(1), grammar) for grammar in (None, begin(regex_format("x")), None)
    ]
    sampled = SAMPLER.sample(logits.clone(), rows)
    assert [sampled[0].token_id, sampled[2].token_id] == logits[[0, 2]].argmax(dim=1).tolist()
    assert TOKENIZER.decode([sampled[1].token_id]) == "x"
    logprobs = logits.log_softmax(dim=1)
    assert sampled[1].logprob.logprob == pytest.approx(float(logprobs[1, sampled[1].token_id])), "the model's own"


def test_special_tokens_are_no_text():
    (special,) = TOKENIZER.encode("<|im_start|>")
    assert not begin(text_format()).accept(special)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (regex_format("(a"), "parenthesis"),
        (regex_format("(?<=a)b"), "Lookbehind"),
        (ebnf_format('root ::= "a" other'), '"other" is not defined'),
        (ebnf_format("start ::= 'a'"), "EBNF"),
        (json_schema_format({"type": "number of things"}), "number of things"),
        (json_schema_format({"$ref": "#/nowhere"}), "nowhere"),
    ],
)
def test_what_can_not_be_compiled_is_refused_with_the_reason(content, reason):
    with pytest.raises(GrammarError, match=reason) as caught:
        compiler().compile(make_grammar(content, "x").structural_tag)
    assert "/project/" not in str(caught.value)


def test_a_grammar_that_is_too_large_or_too_deep_is_refused_before_it_is_compiled():
    with pytest.raises(RequestError, match=f"more than the limit of {MAX_GRAMMAR_BYTES}") as caught:
        make_grammar(regex_format("a" * MAX_GRAMMAR_BYTES), "regex")
    assert caught.value.field == "regex"
    schema: dict = {}
    for _ in range(900):
        schema = {"items": schema}
    with pytest.raises(RequestError, match="nested too deeply"):
        make_grammar(json_schema_format(schema), "json_schema")


# On a rank


def grammar_request(grammar: GrammarState, name: str = "a", prompt: int = 8, max_new_tokens: int = 12) -> Request:
    sampling = SamplingParams(max_new_tokens=max_new_tokens)
    return Request(NewRequest(1, name, list(range(1, prompt + 1)), sampling, 0, False, 0, 1, 0), grammar)


def test_a_retracted_request_goes_on_in_its_grammar():
    scheduler = Scheduler(SchedulerLimits(4, 8, 8, 32, frozenset({EOS})), num_pages=8)
    requests = [grammar_request(begin(regex_format("(zq){20}")), name) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    while not scheduler.is_idle:
        step = scheduler.schedule()
        assert step is not None
        rows = [entry.request.sampling_row for entry in step if entry.samples]
        tokens = [token.token_id for token in SAMPLER.sample(torch.randn(len(rows), VOCAB), rows)]
        scheduler.begin_step(step)
        booked = scheduler.finish_step(step, tokens)
        assert not any(token.reason and token.reason.type == "abort" for token in booked)
    assert scheduler.num_retracted > 0
    for request in requests:
        assert TOKENIZER.decode(request.token_ids[request.prompt_length :]) == "zq" * 6


def test_a_request_ends_with_its_grammar_and_with_an_error_where_no_token_fits():
    ended = grammar_request(begin(regex_format("a")))
    (letter,) = TOKENIZER.encode("a")
    assert take(ended, letter) is None
    assert take(ended, EOS).type == "stop"
    stuck = grammar_request(begin(regex_format("a")))
    assert take(stuck, EOS).type == "abort"


def take(request: Request, token: int) -> FinishReason | None:
    request.token_ids.append(PENDING)
    return request.take(len(request.token_ids) - 1, token, frozenset({EOS}), 100)


def test_the_store_compiles_in_its_own_thread_and_keeps_until_told_otherwise(tmp_path):
    path = tmp_path / "vocabulary.json"
    write_vocabulary(path)
    news, told = [], threading.Event()

    def on_compiled(key: str, error: str | None) -> None:
        news.append((key, error, threading.current_thread().name))
        if len(news) == 2:
            told.set()

    store = GrammarStore(path, on_compiled)
    good, bad = make_grammar(regex_format("ab"), "regex"), make_grammar(regex_format("(a"), "regex")
    for grammar in (good, bad):
        store.compile(grammar.key, grammar.structural_tag)
    assert told.wait(60)
    assert [(key, error is None) for key, error, _ in news] == [(good.key, True), (bad.key, False)]
    assert {thread for _, _, thread in news} == {"grammar compiler"}
    state = store.begin(good)
    store.forget(good.key)
    assert state.accept(TOKENIZER.encode("a")[0]), "a request that has begun goes on"
    with pytest.raises(KeyError):
        store.begin(good)
