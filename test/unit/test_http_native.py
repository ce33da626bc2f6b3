"""SGLang's native routes."""

import itertools
import json
from typing import Any

import pytest

from fake_engine import REPLY, Api, FakeEngine, parrot, sse_events
from nibble.entrypoints.native_protocol import GenerateRequest, NativeSampling
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
(EOS,) = TOKENIZER.eos_token_ids
REPLY_IDS = [*TOKENIZER.encode(REPLY), EOS]
PROMPT_IDS = TOKENIZER.encode("Hi")
# What SGLang's own benchmark sends besides the prompt.
SGLANG_EXTRAS = {
    "lora_path": None,
    "return_logprob": False,
    "return_routed_experts": False,
    "logprob_start_len": -1,
    "image_data": None,
}


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def parroting() -> Api:
    return Api(FakeEngine(parrot))


def without_latency(answer: dict[str, Any]) -> dict[str, Any]:
    latency = answer["meta_info"].pop("e2e_latency")
    assert 0 <= latency < 60
    return answer


@pytest.mark.parametrize("prompt", [{"text": "Hi"}, {"input_ids": PROMPT_IDS}])
def test_the_answer_has_text_tokens_and_meta_info(api, prompt):
    answer = api.result("/generate", {**prompt, "rid": "my-id", "data_parallel_rank": 1, **SGLANG_EXTRAS})
    assert without_latency(answer) == {
        "text": REPLY,
        "output_ids": REPLY_IDS,
        "meta_info": {
            "id": "my-id",
            "finish_reason": {"type": "stop", "matched": EOS},
            "prompt_tokens": len(PROMPT_IDS),
            "completion_tokens": len(REPLY_IDS),
            "cached_tokens": 3,
            "dp_rank": 1,
        },
    }


def test_the_stream_is_cumulative_and_ends_with_done(api):
    events = api.events("/generate", {"text": "Hi"})
    whole = api.result("/generate", {"text": "Hi"})
    texts = [event["text"] for event in events]
    assert all(longer.startswith(shorter) for shorter, longer in itertools.pairwise(texts))
    assert texts[-1] == REPLY
    assert [event["meta_info"]["completion_tokens"] for event in events] == list(range(1, len(REPLY_IDS) + 1))
    assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert without_latency(events[-1])["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"] == whole["meta_info"]["finish_reason"]
    assert "index" not in events[0]


def test_the_defaults_are_sglangs(api):
    api.engine.context_length = 1000
    api.result("/generate", {"text": "Hi"})
    sampling = api.engine.requests[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (128, 1.0, 1.0, -1)


def test_every_sampling_field_reaches_the_engine(api):
    fields = {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "temperature": 0,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "stop": "a",
        "stop_token_ids": [5],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logit_bias": {"3": 1},
        "sampling_seed": -4,
    }
    api.result("/generate", {"text": "Hi", "sampling_params": fields})
    expected = fields | {"stop": ("a",), "stop_token_ids": (5,), "logit_bias": {3: 1}}
    assert {name: getattr(api.engine.requests[0].sampling, name) for name in fields} == expected
    elsewhere = {"n", "stop_regex", "regex", "ebnf", "json_schema"}
    assert set(fields) | elsewhere == set(NativeSampling.model_fields), "a field is missing from this test"


def test_null_means_the_default_for_every_field(api):
    nulls = dict.fromkeys(GenerateRequest.model_fields) | {"text": "Hi"}
    sampling_nulls = dict.fromkeys(NativeSampling.model_fields)
    for body in ({"text": "Hi"}, nulls, {"text": "Hi", "sampling_params": sampling_nulls}):
        api.result("/generate", body)
    assert len({repr(request.sampling) for request in api.engine.requests}) == 1


@pytest.mark.parametrize("field", ["text", "input_ids"])
def test_a_list_of_prompts_is_answered_by_a_list(parroting, field):
    texts = ["first", "second text", "third 世界"]
    prompts = texts if field == "text" else [TOKENIZER.encode(text) for text in texts]
    limits = [{"max_new_tokens": limit} for limit in (1, 100, 2)]
    body = {field: prompts, "sampling_params": limits, "rid": ["a", "b", "c"]}
    answers = parroting.result("/generate", body)
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c"]
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [
        1,
        len(TOKENIZER.encode(texts[1])) + 1,
        2,
    ]
    assert answers[1]["text"] == "second text"
    events = parroting.events("/generate", body)
    for index, answer in enumerate(answers):
        last = [event for event in events if event["index"] == index][-1]
        assert (last["text"], last["output_ids"]) == (answer["text"], answer["output_ids"])


def test_a_list_of_one_prompt_is_answered_by_a_list(api):
    assert len(api.result("/generate", {"text": ["Hi"]})) == 1


def test_one_id_for_several_prompts_is_numbered(api):
    answers = api.result("/generate", {"text": ["Hi", "Ho"], "rid": "x"})
    assert [answer["meta_info"]["id"] for answer in answers] == ["x-0", "x-1"]


def test_several_choices_are_answered_by_a_list(api):
    body = {"text": "Hi", "sampling_params": {"n": 2, "sampling_seed": 7}}
    assert [answer["text"] for answer in api.result("/generate", body)] == [REPLY, REPLY]
    assert [request.sampling.sampling_seed for request in api.engine.requests] == [7, 8]
    assert {event["index"] for event in api.events("/generate", body)} == {0, 1}


@pytest.mark.parametrize("with_text", [False, True])
def test_logprobs_of_the_output_are_triples(api, with_text):
    body = {"text": "Hi", "return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": with_text}
    meta_info = api.result("/generate", body)["meta_info"]
    assert [token for _, token, _ in meta_info["output_token_logprobs"]] == REPLY_IDS
    assert {logprob for logprob, _, _ in meta_info["output_token_logprobs"]} == {-0.5}
    assert meta_info["output_token_logprobs"][0][2] == (TOKENIZER.decode(REPLY_IDS[:1]) if with_text else None)
    assert meta_info["output_top_logprobs"][0][0] == meta_info["output_token_logprobs"][0]
    assert [len(position) for position in meta_info["output_top_logprobs"]] == [2] * len(REPLY_IDS)
    streamed = api.events("/generate", body)
    assert [len(event["meta_info"]["output_token_logprobs"]) for event in streamed] == list(
        range(1, len(REPLY_IDS) + 1)
    )
    for field in ("output_token_logprobs", "output_top_logprobs"):
        assert streamed[-1]["meta_info"][field] == meta_info[field]


def test_top_logprobs_are_left_out_unless_asked_for(api):
    meta_info = api.result("/generate", {"text": "Hi", "return_logprob": True})["meta_info"]
    assert "output_top_logprobs" not in meta_info
    assert "output_token_logprobs" not in api.result("/generate", {"text": "Hi"})["meta_info"]


def test_the_finish_reason_says_what_matched_or_how_long_the_text_is(api):
    def finish_reason(**sampling: Any) -> dict[str, Any]:
        return api.result("/generate", {"text": "Hi", "sampling_params": sampling})["meta_info"]["finish_reason"]

    assert finish_reason(max_new_tokens=4) == {"type": "length", "length": 4}
    assert finish_reason(stop="</div>") == {"type": "stop", "matched": "</div>"}
    assert finish_reason(stop_token_ids=[REPLY_IDS[1]]) == {"type": "stop", "matched": REPLY_IDS[1]}


def test_a_failed_generation_is_an_error(api):
    api.engine.fail_after = 2
    assert api.error("/generate", {"text": "Hi"}, status=500)["code"] == "generation_failed"
    events = sse_events(api.post("/generate", {"text": "Hi", "stream": True}).text)
    assert json.loads(events[-1])["error"]["message"] == "the row became NaN"


# The tokenizer's routes


def test_texts_are_tokenized_alone_and_in_lists(api):
    tokens = TOKENIZER.encode("Hello, world")
    one = api.result("/v1/tokenize", {"model": "any", "prompt": "Hello, world"})
    assert one == {"tokens": tokens, "count": len(tokens), "max_model_len": api.engine.context_length}
    several = api.result("/v1/tokenize", {"prompt": ["Hello, world", ""]})
    assert (several["tokens"], several["count"]) == ([tokens, []], [len(tokens), 0])


def test_tokens_become_text_again_alone_and_in_lists(api):
    tokens = [*TOKENIZER.encode("Hello"), EOS]
    assert api.result("/v1/detokenize", {"tokens": tokens}) == {"text": "Hello"}
    shown = api.result("/v1/detokenize", {"tokens": [tokens, []], "skip_special_tokens": False})
    assert shown == {"text": ["Hello<|im_end|>", ""]}
    assert api.result("/v1/detokenize", {"tokens": []}) == {"text": ""}


def test_the_tokenizer_also_answers_where_vllms_benchmark_looks_for_it(api):
    """Without these paths it skips its check that both sides count the same tokens."""
    prompt = {"model": "m", "prompt": "Hello, world", "add_special_tokens": False}
    tokens = api.result("/tokenize", prompt)["tokens"]
    assert tokens == TOKENIZER.encode("Hello, world")
    assert api.result("/detokenize", {"model": "m", "tokens": tokens}) == {"text": "Hello, world"}


@pytest.mark.parametrize("token", [-1, TOKENIZER.vocab_size, 2**63])
def test_tokens_outside_the_vocabulary_have_no_text(api, token):
    error = api.error("/v1/detokenize", {"tokens": [[1], [2, token]]})
    assert str(token) in error["message"]
    assert error["param"] == "tokens"
