"""Reusing prefixes saves work and changes no answer: cache on and off, in chunks, with evictions, over ranks."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nibble
from nibble.utils.errors import RequestError

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model.data import heldout

COUNT = 12
GREEDY = {"temperature": 0, "max_new_tokens": 48}
ENDLESS = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def start(bf16_checkpoint):
    """Starts an engine with these flags."""

    def start(**flags: object) -> nibble.Engine:
        return nibble.Engine(model_path=str(bf16_checkpoint), log_level="warning", **flags)

    return start


@pytest.fixture(scope="module")
def engine(start) -> Iterator[nibble.Engine]:
    with start() as engine:
        yield engine


class Answers:
    """What a conversation of two turns each gets, and how much of the prompts was cached."""

    def __init__(self, engine: nibble.Engine) -> None:
        conversations = [list(conversation.prompt) for conversation in heldout(COUNT, seed="prefix cache")]
        self.texts: list[list[str]] = []
        self.cached: list[list[int]] = []
        for follow_up in (None, {"role": "user", "content": "Are you sure? Please say it again."}):
            if follow_up is not None:
                for conversation, text in zip(conversations, self.texts[-1], strict=True):
                    conversation += [{"role": "assistant", "content": text}, follow_up]
            self.prompts = [engine.tokenizer.apply_chat_template(conversation) for conversation in conversations]
            outputs = engine.generate(input_ids=self.prompts, sampling_params=GREEDY)
            self.texts.append([output["text"] for output in outputs])
            self.cached.append([output["meta_info"]["cached_tokens"] for output in outputs])


@pytest.fixture(scope="module")
def without_cache(start) -> Answers:
    with start(disable_radix_cache=True) as engine:
        return Answers(engine)


def reusable(engine: nibble.Engine, tokens: list[int]) -> int:
    """Whole pages, without the last token."""
    return (len(tokens) - 1) // engine.config.args.page_size * engine.config.args.page_size


def test_without_the_cache_nothing_is_reported_as_cached(without_cache):
    assert not any(map(any, without_cache.cached))


def test_the_cache_changes_no_answer(engine, without_cache):
    assert_the_cache_changes_no_answer(engine, without_cache)


@pytest.mark.parametrize(
    "flags",
    [
        {"page_size": 1, "chunked_prefill_size": 7},
        # Room for the longest context and no more: prefixes are evicted.
        {"max_total_tokens": 544, "context_length": 544, "page_size": 4, "chunked_prefill_size": 16},
        {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True},
        {"schedule_policy": "lpm", "max_running_requests": 3, "max_overtakes": 2},
    ],
    ids=["single tokens in chunks", "a tiny cache", "two ranks", "longest prefix first"],
)
def test_neither_chunks_nor_evictions_nor_ranks_nor_the_order_make_the_cache_change_an_answer(
    start, without_cache, flags
):
    with start(**flags) as other:
        assert_the_cache_changes_no_answer(other, without_cache)


def assert_the_cache_changes_no_answer(engine: nibble.Engine, without_cache: Answers) -> None:
    answers = Answers(engine)
    assert answers.texts == without_cache.texts
    assert any(map(any, answers.cached)), "it was used"
    again = engine.generate(input_ids=answers.prompts, sampling_params=GREEDY)
    assert [output["text"] for output in again] == without_cache.texts[1]


def test_the_second_turn_finds_the_first_one_but_for_a_page(engine):
    engine.flush_cache()
    first = engine.tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 plus 25?"}])
    answer = engine.generate(input_ids=first, sampling_params=GREEDY)
    assert answer["meta_info"]["cached_tokens"] == 0
    conversation = [*first, *answer["output_ids"]]
    second = engine.generate(input_ids=[*conversation, *first], sampling_params=GREEDY)
    assert second["meta_info"]["cached_tokens"] == reusable(engine, conversation)


@pytest.fixture
def prompt(engine, without_cache) -> list[int]:
    """A prompt of a conversation, of which nothing is cached yet."""
    engine.flush_cache()
    return without_cache.prompts[0]


def test_a_prompt_of_whole_pages_that_are_all_cached_still_gets_its_answer(engine, prompt):
    page = engine.config.args.page_size
    whole_pages = prompt[-(len(prompt) // page * page) :]
    outputs = [engine.generate(input_ids=whole_pages, sampling_params=GREEDY) for _ in range(3)]
    cached = len(whole_pages) - page
    assert [output["meta_info"]["cached_tokens"] for output in outputs] == [0, cached, cached]
    assert len({output["text"] for output in outputs}) == 1


def test_requests_share_the_prompt_of_one_that_still_runs(engine, prompt, without_cache):
    running = engine.generate(input_ids=prompt, sampling_params=ENDLESS, stream=True)
    next(running)
    outputs = engine.generate(input_ids=[prompt] * 3, sampling_params=GREEDY)
    running.close()
    assert [output["meta_info"]["cached_tokens"] for output in outputs] == [reusable(engine, prompt)] * 3
    assert [output["text"] for output in outputs] == [without_cache.texts[1][0]] * 3


def test_the_prompt_of_a_client_that_went_away_stays_cached(engine, prompt):
    stream = engine.generate(input_ids=prompt, sampling_params=ENDLESS, stream=True)
    next(stream)
    stream.close()
    again = engine.generate(input_ids=prompt, sampling_params=GREEDY)
    assert again["meta_info"]["cached_tokens"] == reusable(engine, prompt)


def test_a_flush_is_refused_while_a_request_runs(engine, prompt):
    stream = engine.generate(input_ids=prompt, sampling_params=ENDLESS, stream=True)
    next(stream)
    with pytest.raises(RequestError, match="there are 1"):
        engine.flush_cache()
    stream.close()
    engine.flush_cache()
