"""The engine without HTTP: the same answers whatever the chunks, the cache, the order and the company."""

import asyncio
import random
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

import nibble
from nibble.observability.rank_stats import RankStats
from nibble.utils.errors import ConfigError, EngineDeadError, RequestError
from server_process import DEMO_MODEL, shared_files, wait_until_gone

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model.data import heldout

GREEDY = {"temperature": 0, "max_new_tokens": 48}


@pytest.fixture(scope="module")
def engine(bf16_checkpoint):
    with nibble.Engine(model_path=str(bf16_checkpoint), disable_radix_cache=True, log_level="warning") as engine:
        yield engine  # without the prefix cache, so that every prompt is computed


@pytest.fixture(scope="module")
def prompts(engine) -> list[list[int]]:
    return [engine.tokenizer.apply_chat_template(conversation.prompt) for conversation in heldout(20, seed="engine")]


@pytest.fixture(scope="module")
def expected(engine, prompts) -> list[str]:
    return [engine.generate(input_ids=prompt, sampling_params=GREEDY)["text"] for prompt in prompts]


def texts(engine: nibble.Engine, prompts: list[list[int]], **fields: object) -> list[str]:
    return [output["text"] for output in engine.generate(input_ids=prompts, sampling_params=GREEDY, **fields)]


def test_requests_together_get_the_answers_they_get_alone(engine, prompts, expected):
    assert texts(engine, prompts) == expected


def test_the_order_of_arrival_changes_no_answer(engine, prompts, expected):
    order = random.Random(1).sample(range(len(prompts)), len(prompts))
    assert texts(engine, [prompts[i] for i in order]) == [expected[i] for i in order]


def test_neither_chunks_nor_pages_nor_batches_change_an_answer(bf16_checkpoint, prompts, expected):
    sizes = {"chunked_prefill_size": 5, "page_size": 1, "max_running_requests": 3}
    with nibble.Engine(model_path=str(bf16_checkpoint), log_level="warning", **sizes) as other:
        assert texts(other, prompts) == expected


def test_requests_that_are_retracted_get_the_answers_they_get_with_room(bf16_checkpoint, engine, prompts):
    """Of six whose prompts fit together, the cache has room for one whole answer."""
    asked = {
        "input_ids": sorted(prompts, key=len)[:6],
        "sampling_params": {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True},
    }
    sizes = {"max_total_tokens": 256, "context_length": 256, "page_size": 4}
    statistics: list[RankStats] = []
    with nibble.Engine(model_path=str(bf16_checkpoint), enable_metrics=True, log_level="warning", **sizes) as other:
        other._engine.on_rank_stats = statistics.append
        outputs = other.generate(**asked)
        deadline = time.monotonic() + 20
        while not any(report.num_retracted for report in statistics):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with_room = engine.generate(**asked)
    assert [output["output_ids"] for output in outputs] == [output["output_ids"] for output in with_room]


def test_a_seed_fixes_the_tokens_whatever_else_is_in_the_batch(engine, prompts):
    sampling = {"temperature": 3.0, "top_p": 0.99, "sampling_seed": 11, "max_new_tokens": 24, "ignore_eos": True}
    alone = engine.generate(input_ids=prompts[0], sampling_params=sampling)["text"]
    company = [{"temperature": 1.0, "max_new_tokens": 24} for _ in prompts[1:9]]
    outputs = engine.generate(input_ids=prompts[1:9] + prompts[:1], sampling_params=[*company, sampling])
    assert outputs[-1]["text"] == alone
    other = engine.generate(input_ids=prompts[0], sampling_params={**sampling, "sampling_seed": 12})["text"]
    assert other != alone


SPLITS = {
    "attention over two ranks": {"tp_size": 2},
    "two attention groups of two ranks": {"tp_size": 4, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True},
}


@pytest.fixture(scope="module", params=SPLITS.values(), ids=SPLITS)
def split_engine(request, bf16_checkpoint):
    with nibble.Engine(model_path=str(bf16_checkpoint), page_size=4, log_level="warning", **request.param) as engine:
        yield engine


def test_a_model_split_over_ranks_gives_the_answers_of_one(split_engine, prompts, expected):
    outputs = split_engine.generate(input_ids=prompts, sampling_params=GREEDY)
    assert [output["text"] for output in outputs] == expected
    groups = split_engine.config.parallel.dp_size
    assert {output["meta_info"]["dp_rank"] for output in outputs} == set(range(groups))
    assert len(split_engine.server_info()["requests_per_rank"]) == groups


def test_all_ranks_of_a_group_draw_the_same_token(split_engine, engine, prompts):
    """Each draws for itself; if one drew another token, it would compute on from that and the group fall apart."""
    sampling = {"temperature": 3.0, "top_p": 0.99, "sampling_seed": 11, "max_new_tokens": 24, "ignore_eos": True}
    texts = [e.generate(input_ids=prompts[:4], sampling_params=sampling) for e in (split_engine, engine)]
    assert [output["text"] for output in texts[0]] == [output["text"] for output in texts[1]]


def test_aborts_at_any_moment_leave_the_ranks_of_a_group_in_step(split_engine, prompts, expected):
    """Heard by one rank a step before the other, an abort would leave them with different batches, and hanging."""

    async def ask(prompt: list[int], news: int) -> None:
        stream = await split_engine.async_generate(
            input_ids=prompt, sampling_params={"max_new_tokens": 500, "ignore_eos": True}, stream=True
        )
        async for _ in stream:
            news -= 1
            if news <= 0:
                break
        await stream.aclose()

    async def ask_all() -> None:
        await asyncio.gather(*(ask(prompt, news=index % 7) for index, prompt in enumerate(prompts)))

    asyncio.run(ask_all())
    assert texts(split_engine, prompts) == expected
    split_engine.flush_cache()
    assert texts(split_engine, prompts[:5]) == expected[:5]


def test_requests_without_a_seed_differ(engine, prompts):
    sampling = {"temperature": 2.0, "max_new_tokens": 24, "ignore_eos": True}
    outputs = engine.generate(input_ids=[prompts[0]] * 4, sampling_params=sampling)
    assert len({output["text"] for output in outputs}) == 4


def test_stop_strings_end_the_text_before_them(engine):
    prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 plus 25?"}])
    full = engine.generate(input_ids=prompt, sampling_params=GREEDY)["text"]
    assert full == "17 plus 25 is 42."
    output = engine.generate(input_ids=prompt, sampling_params={**GREEDY, "stop": ["us 2", "42"]})
    assert output["text"] == "17 pl"
    assert output["meta_info"]["finish_reason"] == {"type": "stop", "matched": "us 2"}


def test_snapshots_of_a_stream_are_cumulative_and_end_with_the_answer(engine, prompts, expected):
    snapshots = list(engine.generate(input_ids=prompts[0], sampling_params=GREEDY, stream=True))
    seen = [snapshot["text"] for snapshot in snapshots]
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert seen[-1] == expected[0]
    assert [s["meta_info"]["finish_reason"] is None for s in snapshots] == [True] * (len(snapshots) - 1) + [False]


def test_a_stream_that_is_dropped_ends_its_request(engine, prompts):
    stream = engine.generate(
        input_ids=prompts[0], sampling_params={"max_new_tokens": 1000, "ignore_eos": True}, stream=True
    )
    next(stream)
    assert engine.server_info()["requests_per_rank"] == [1]
    stream.close()
    assert engine.server_info()["requests_per_rank"] == [0]


def test_async_generate_works_under_the_callers_event_loop(engine, prompts, expected):
    async def run() -> tuple[list[dict], list[dict]]:
        whole = await asyncio.gather(
            *(engine.async_generate(input_ids=prompt, sampling_params=GREEDY) for prompt in prompts[:5])
        )
        stream = await engine.async_generate(input_ids=prompts[0], sampling_params=GREEDY, stream=True)
        return whole, [snapshot async for snapshot in stream]

    whole, snapshots = asyncio.run(run())
    assert [output["text"] for output in whole] == expected[:5]
    assert snapshots[-1]["text"] == expected[0]


def test_a_request_that_can_never_fit_is_refused_at_once_with_the_numbers(engine):
    with pytest.raises(RequestError, match=r"3000.*2048"):
        engine.generate(input_ids=[5] * 3000)
    with pytest.raises(RequestError, match=r"2040.*2048"):
        engine.generate(input_ids=[5] * 2040, sampling_params={"max_new_tokens": 100})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x", "sampling_params": {"temperature": -1}}, "temperature must be between 0 and 100, got -1"),
        ({"prompt": "x", "sampling_params": {"no_such": 1}}, "no_such is not supported"),
        ({"prompt": "x", "sampling_params": {"max_new_tokens": "many"}}, 'should be a valid integer, got "many"'),
        ({"input_ids": [10**6]}, "outside the vocabulary"),
        ({"prompt": "x", "data_parallel_rank": 1}, "data_parallel_rank must be between 0 and 0"),
        ({}, "text or input_ids"),
    ],
)
def test_what_http_refuses_is_a_request_error_here(engine, fields, message):
    with pytest.raises(RequestError) as error:
        engine.generate(**fields)
    assert message in str(error.value)


def test_a_dense_model_runs_on_ranks_that_need_not_meet(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    from transformers import AutoTokenizer

    from checkpoints import save_qwen3

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    save_qwen3(tmp_path, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path)
    with nibble.Engine(
        model_path=str(tmp_path), tp_size=2, dp_size=2, enable_dp_attention=True, log_level="warning"
    ) as engine:
        outputs = engine.generate(["1 plus 1", "2 plus 2"], {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True})
        assert {output["meta_info"]["dp_rank"] for output in outputs} == {0, 1}
        assert [output["meta_info"]["completion_tokens"] for output in outputs] == [8, 8]


def test_an_engine_that_is_shut_down_leaves_nothing_behind_and_takes_nothing_more(bf16_checkpoint):
    before = shared_files()
    engine = nibble.Engine(
        model_path=str(bf16_checkpoint),
        tp_size=2,
        dp_size=2,
        ep_size=2,
        enable_dp_attention=True,
        log_level="warning",
    )
    ranks = [psutil.Process(pid) for pid in engine.server_info()["rank_process_ids"]]
    ranks[0].kill()
    wait_until_gone(ranks[:1])
    with pytest.raises(EngineDeadError, match="rank"):
        engine.generate("What is 1 plus 1?", {"max_new_tokens": 500, "ignore_eos": True})
    engine.shutdown()
    engine.shutdown()
    wait_until_gone(ranks)
    assert shared_files() <= before


def test_a_start_that_fails_raises_and_leaves_nothing_behind(tmp_path):
    before = shared_files()
    with pytest.raises(ConfigError, match="does not exist"):
        nibble.Engine(model_path=str(tmp_path))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((DEMO_MODEL / name).read_bytes())
    with pytest.raises(EngineDeadError, match=r"holds no .safetensors file"):
        nibble.Engine(model_path=str(tmp_path), log_level="warning")
    assert shared_files() <= before
