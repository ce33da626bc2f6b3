"""What is refused: always with 400, in OpenAI's form, naming the field; never ignored and never a server error."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fake_engine import Api
from nibble.entrypoints.native_protocol import (
    AbortRequest,
    DetokenizeRequest,
    GenerateRequest,
    NativeSampling,
    TokenizeRequest,
)
from nibble.entrypoints.openai_protocol import ChatCompletionRequest, ChatMessage, CompletionRequest
from nibble.entrypoints.request_model import RequestModel
from tiny_tokenizer import tiny_tokenizer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
GENERATE = "/generate"
HELLO = [{"role": "user", "content": "Hi"}]
API = Api()
MINIMAL: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": HELLO},
    GENERATE: {"text": "Hi"},
    "/v1/tokenize": {"prompt": "Hi"},
    "/v1/detokenize": {"tokens": [1]},
    "/abort_request": {"rid": "x"},
}


def refuse(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The error for the smallest valid request with these fields changed."""
    API.engine.requests.clear()
    error = API.error(path, {**MINIMAL[path], **fields})
    assert not API.engine.requests, "a refused request must not reach the engine"
    assert error["type"] == "invalid_request_error"
    return error


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"functions": [TOOL]}),
    (CHAT, {"function_call": {"name": "f"}}),
    (CHAT, {"reasoning_effort": "high"}),
    (CHAT, {"store": True}),
    (CHAT, {"modalities": ["text", "audio"]}),
    (CHAT, {"audio": {"voice": "x"}}),
    (CHAT, {"prediction": {"type": "content"}}),
    (CHAT, {"web_search_options": {"x": 1}}),
    (CHAT, {"chat_template": "{{ messages }}"}),
    (CHAT, {"add_generation_prompt": True}),
    (COMPLETIONS, {"suffix": "x"}),
    (COMPLETIONS, {"use_beam_search": True}),
    (COMPLETIONS, {"prompt_logprobs": 1}),
    (COMPLETIONS, {"guided_json": {"x": 1}}),
    *[(path, {name: "x"}) for path in (CHAT, COMPLETIONS) for name in ("json_schema", "structural_tag")],
    *[(path, {"lora_path": "adapter"}) for path in (CHAT, COMPLETIONS, GENERATE)],
    *[(path, {"my_own_field": 0}) for path in MINIMAL],
    (GENERATE, {"return_routed_experts": True}),
    (GENERATE, {"image_data": "http://x"}),
    (GENERATE, {"audio_data": "http://x"}),
    (GENERATE, {"input_embeds": [[0.1]]}),
    (GENERATE, {"session_params": {"id": 1}}),
]


@pytest.mark.parametrize(("path", "fields"), UNSUPPORTED, ids=lambda value: json.dumps(value)[:60])
def test_what_is_not_supported_is_refused_by_name(path, fields):
    error = refuse(path, fields)
    name = next(iter(fields))
    assert error["param"] == name
    assert name in error["message"]
    assert "support" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
def test_a_priority_is_refused_out_of_range_and_where_priorities_are_not_used(path):
    api = Api()
    api.engine.takes_priorities = False
    for engine_api, priority, words in ((api, 1, "--enable-priority-scheduling"), (Api(), 101, "between -100 and 100")):
        response = engine_api.post(path, {**MINIMAL[path], "priority": priority})
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["structural_tag", "custom_params"])
def test_unsupported_sampling_params_are_refused_by_name(name):
    error = refuse(GENERATE, {"sampling_params": {name: "x"}})
    assert error["param"] == f"sampling_params.{name}"
    assert f"{name} is not supported" in error["message"]


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_content_that_is_not_text_is_refused(kind):
    parts = [{"type": "text", "text": "a"}, {"type": kind, kind: {"url": "http://x"}}]
    error = refuse(CHAT, {"messages": [{"role": "user", "content": parts}]})
    assert error["param"].startswith("messages.0.content.1")
    assert kind in error["message"]


@pytest.mark.parametrize("field", ["function_call", "audio", "thinking"])
def test_message_fields_that_are_not_supported_are_refused(field):
    error = refuse(CHAT, {"messages": [{"role": "assistant", "content": "a", field: "x"}]})
    assert error["param"] == f"messages.0.{field}"


NEUTRAL: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"tools": [], "tool_choice": "none", "functions": None, "parallel_tool_calls": True}),
    (CHAT, {"tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"]}),
    (CHAT, {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}),
    (CHAT, {"safety_identifier": "x", "prompt_cache_key": "y", "reasoning_effort": None}),
    (
        CHAT,
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": None, "refusal": None, "annotations": []}]},
    ),
    (CHAT, {"stream": False, "stream_options": None}),
    (COMPLETIONS, {"suffix": None, "best_of": 1, "user": "me", "regex": None, "lora_path": None}),
    (COMPLETIONS, {"n": 2, "best_of": 2}),
    (COMPLETIONS, {"anything": False, "something": None, "nothing": []}),
    (GENERATE, {"lora_path": None, "return_routed_experts": False, "logprob_start_len": -1, "image_data": None}),
    (GENERATE, {"token_ids_logprob": None, "logprob_start_len": 0, "return_logprob": False}),
    (GENERATE, {"sampling_params": {"regex": None, "json_schema": None, "spaces_between_special_tokens": True}}),
    ("/abort_request", {"abort_all": False}),
]


@pytest.mark.parametrize(("path", "fields"), NEUTRAL, ids=lambda value: json.dumps(value)[:60])
def test_what_asks_for_nothing_is_accepted(path, fields):
    API.result(path, {**MINIMAL[path], **fields})


OUT_OF_RANGE: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"temperature": -0.5}, "temperature", "-0.5"),
    (COMPLETIONS, {"temperature": 101}, "temperature", "101"),
    (COMPLETIONS, {"top_p": 0}, "top_p", "0"),
    (COMPLETIONS, {"top_p": 1.5}, "top_p", "1.5"),
    (COMPLETIONS, {"top_k": 0}, "top_k", "0"),
    (COMPLETIONS, {"top_k": 2**31}, "top_k", "2147483648"),
    (COMPLETIONS, {"min_p": 2}, "min_p", "2"),
    (COMPLETIONS, {"frequency_penalty": 3}, "frequency_penalty", "3"),
    (COMPLETIONS, {"presence_penalty": -3}, "presence_penalty", "-3"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty", "0"),
    (COMPLETIONS, {"n": 0}, "n", "0"),
    (COMPLETIONS, {"n": 129}, "n", "129"),
    (COMPLETIONS, {"n": 10**18}, "n", str(10**18)),
    (COMPLETIONS, {"max_tokens": -1}, "max_tokens", "-1"),
    (COMPLETIONS, {"max_tokens": 199}, "max_tokens", "199"),
    (COMPLETIONS, {"min_tokens": -1}, "min_tokens", "-1"),
    (COMPLETIONS, {"min_tokens": 17}, "min_tokens", "17"),
    (COMPLETIONS, {"seed": 2**63}, "seed", str(2**63)),
    (COMPLETIONS, {"logprobs": 21}, "logprobs", "21"),
    (COMPLETIONS, {"logit_bias": {"x": 1}}, "logit_bias", "'x'"),
    (COMPLETIONS, {"logit_bias": {"-1": 1}}, "logit_bias", "-1"),
    (COMPLETIONS, {"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
    (COMPLETIONS, {"logit_bias": {"1": 101}}, "logit_bias", "101"),
    (COMPLETIONS, {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "logit_bias takes at most 1024"),
    (CHAT, {"chat_template_kwargs": {str(i): 1 for i in range(65)}}, "chat_template_kwargs", "at most 64"),
    (GENERATE, {"sampling_params": [{}] * 1025}, "sampling_params", "1024"),
    (COMPLETIONS, {"stop": ["x"] * 65}, "stop", "65"),
    (COMPLETIONS, {"stop": "x" * 1025}, "stop", "1025"),
    (COMPLETIONS, {"stop": ""}, "stop", "0"),
    (COMPLETIONS, {"stop_token_ids": [-1]}, "stop_token_ids", "-1"),
    (COMPLETIONS, {"stop_token_ids": [99999]}, "stop_token_ids", "99999"),
    (COMPLETIONS, {"data_parallel_rank": 2}, "data_parallel_rank", "2"),
    (COMPLETIONS, {"prompt": ["x"] * 1025}, "prompt", "1024"),
    (COMPLETIONS, {"prompt": ["x"] * 1000, "n": 5}, "n", "5000"),
    (CHAT, {"max_completion_tokens": 200}, "max_completion_tokens", "200"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "21"),
    (CHAT, {"messages": HELLO * 4097}, "messages", "4096"),
    (GENERATE, {"top_logprobs_num": 21}, "top_logprobs_num", "21"),
    (GENERATE, {"rid": "x" * 257}, "rid", "257"),
    (GENERATE, {"sampling_params": {"max_new_tokens": 199}}, "sampling_params.max_new_tokens", "199"),
    (GENERATE, {"sampling_params": {"sampling_seed": 2**63}}, "sampling_params.sampling_seed", str(2**63)),
    (GENERATE, {"sampling_params": {"min_new_tokens": 129}}, "sampling_params.min_new_tokens", "129"),
    (GENERATE, {"sampling_params": {"stop": ""}}, "sampling_params.stop", "entries of stop"),
    (
        GENERATE,
        {"text": ["a", "b"], "sampling_params": [{}, {"top_p": 3}]},
        "sampling_params.1.top_p",
        "sampling_params.1.top_p must be",
    ),
]


@pytest.mark.parametrize(("path", "fields", "param", "shown"), OUT_OF_RANGE, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_value_out_of_range_is_named_with_its_limit(path, fields, param, shown, stream):
    error = refuse(path, {**fields, "stream": stream})
    assert error["param"] == param
    assert shown in error["message"]


TOGETHER: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"max_tokens": 2, "max_completion_tokens": 3}, "max_tokens"),
    (CHAT, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    (GENERATE, {"input_ids": [1]}, "text"),
    (GENERATE, {"text": None}, "text"),
    (GENERATE, {"sampling_params": [{}]}, "sampling_params"),
    (GENERATE, {"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    (GENERATE, {"rid": ["a"]}, "rid"),
    (GENERATE, {"text": ["a", "b"], "rid": ["a", "a"]}, "rid"),
]


@pytest.mark.parametrize(("path", "fields", "param"), TOGETHER, ids=lambda value: str(value)[:50])
def test_fields_that_contradict_each_other_are_refused(path, fields, param):
    assert refuse(path, fields)["param"] == param


WRONG_TYPES: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, {"temperature": "hot"}, "temperature", '"hot"'),
    (COMPLETIONS, {"temperature": True}, "temperature", "true"),
    (COMPLETIONS, {"max_tokens": 2.5}, "max_tokens", "2.5"),
    (COMPLETIONS, {"max_tokens": True}, "max_tokens", "true"),
    (COMPLETIONS, {"max_tokens": "5"}, "max_tokens", '"5"'),
    (COMPLETIONS, {"stream": 1}, "stream", "1"),
    (COMPLETIONS, {"stop": 5}, "stop", "string"),
    (COMPLETIONS, {"stop": ["a", 5]}, "stop.1", "5"),
    (COMPLETIONS, {"prompt": 5}, "prompt", "5"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt", "an object"),
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt.1", '"a"'),
    (COMPLETIONS, {"prompt": None}, "prompt", "required"),
    (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
    (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
    (COMPLETIONS, {"seed": 10**30}, "seed", "1e+30"),
    (COMPLETIONS, {"user": None, "logit_bias": [1]}, "logit_bias", "a valid object, got a list"),
    (COMPLETIONS, {"logit_bias": {"1": "x"}}, "logit_bias", 'a valid number, got "x"'),
    (CHAT, {"tools": [TOOL | {"function": {"name": "a b"}}]}, "tools.0.function.name", "should match pattern"),
    (CHAT, {"messages": []}, "messages", "at least 1 item"),
    (CHAT, {"messages": "Hi"}, "messages", '"Hi"'),
    (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "required"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "required"),
    (CHAT, {"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages.0.content", "an object"),
    (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", '"robot"'),
    (CHAT, {"messages": [HELLO]}, "messages.0", "a valid object, got a list"),
    (GENERATE, {"sampling_params": 3}, "sampling_params", "3"),
    (GENERATE, {"sampling_params": {"n": "2"}}, "sampling_params.n", '"2"'),
    (GENERATE, {"text": [["a"]]}, "text", "a text or a list of texts"),
    (GENERATE, {"text": ["a", ["b"]]}, "text.1", "a list"),
    (GENERATE, {"text": None, "input_ids": ["a"]}, "input_ids", "token ids or a list"),
    (GENERATE, {"text": None, "input_ids": [[1], [2, "a"]]}, "input_ids.1.1", '"a"'),
    (GENERATE, {"text": None, "input_ids": [[1], []]}, "input_ids", "empty"),
    (GENERATE, {"text": []}, "text", "got []"),
    (GENERATE, {"rid": 5}, "rid", "5"),
    ("/abort_request", {"rid": ""}, "rid", "either rid or abort_all"),
    ("/abort_request", {"rid": None}, "rid", "either rid or abort_all"),
    ("/abort_request", {"abort_all": True}, "rid", "either rid or abort_all"),
]


@pytest.mark.parametrize(("path", "fields", "param", "shown"), WRONG_TYPES, ids=lambda value: str(value)[:50])
def test_a_wrong_type_is_named_with_what_was_sent(path, fields, param, shown):
    error = refuse(path, fields)
    assert shown in error["message"]
    assert error["param"] == param


@pytest.mark.parametrize("token", [-1, tiny_tokenizer().vocab_size, 2**63])
def test_prompt_tokens_outside_the_vocabulary_are_refused(token):
    for path, field in ((COMPLETIONS, "prompt"), (GENERATE, "input_ids")):
        body = {**MINIMAL[path], "text": None, field: [1, token, 2]}
        assert f"holds token {token}, outside the vocabulary" in API.error(path, body)["message"]


LONG_CHAT = [{"role": "user", "content": "word " * 300}]
OVER_LONG: list[tuple[str, dict[str, Any], str, list[str]]] = [
    (COMPLETIONS, {"prompt": [1] * 200}, "prompt", ["the prompt has 200 tokens", "of 200 tokens"]),
    (COMPLETIONS, {"prompt": [1] * 150, "max_tokens": 51}, "max_tokens", ["51", "150", "200", "at most 50"]),
    (CHAT, {"messages": LONG_CHAT}, "messages", ["the prompt has", "of 200 tokens"]),
    (CHAT, {"messages": HELLO, "max_tokens": 199}, "max_tokens", ["199", "200", "at most"]),
    (GENERATE, {"text": None, "input_ids": [1] * 5000}, "input_ids", ["the prompt has 5000 tokens", "of 200 tokens"]),
    (GENERATE, {"text": ["Hi", "x" * 5000]}, "text", ["the prompt has", "of 200 tokens"]),
    (
        GENERATE,
        {"sampling_params": {"max_new_tokens": 10**9}},
        "sampling_params.max_new_tokens",
        [str(10**9), "200", "at most"],
    ),
]


@pytest.mark.parametrize(("path", "fields", "param", "numbers"), OVER_LONG, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_over_long_request_is_answered_with_400_and_the_numbers(path, fields, param, numbers, stream):
    error = refuse(path, {**fields, "stream": stream})
    assert error["param"] == param
    assert all(number in error["message"] for number in numbers), error


MANY = 5000
WIDE: list[tuple[type[RequestModel], dict[str, Any]]] = [
    (CompletionRequest, {"prompt": "x", "logit_bias": {str(i): "x" for i in range(MANY)}}),
    (CompletionRequest, {"prompt": "x", "stop": [1] * MANY}),
    (CompletionRequest, {"prompt": "x", "stop_token_ids": ["a"] * MANY}),
    (CompletionRequest, {"prompt": [{}] * MANY}),
    (CompletionRequest, {"prompt": [["a"] * MANY] * MANY}),
    (ChatCompletionRequest, {"messages": [{}] * MANY}),
    (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{}] * MANY}]}),
    (ChatCompletionRequest, {"messages": HELLO, "chat_template_kwargs": {str(i): [] for i in range(MANY)}}),
    (GenerateRequest, {"text": "x", "sampling_params": [{"n": "x"}] * MANY}),
    (GenerateRequest, {"text": "x", "rid": [1] * MANY}),
    (TokenizeRequest, {"prompt": [["a"]] * MANY}),
    (DetokenizeRequest, {"tokens": [["a"]] * MANY}),
]


@pytest.mark.parametrize(("model", "content"), WIDE, ids=lambda value: str(value)[:60])
def test_errors_are_not_collected_by_the_thousand(model, content):
    """Describing each takes memory and time, and a body has room for millions."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(content)
    assert caught.value.error_count() < 10


BAD_JSON = [
    b"",
    b"{",
    b"[1, 2]",
    b'"text"',
    b"null",
    b'{"prompt": NaN}',
    b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "temperature": Infinity}',
    b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "x",}',
    b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"prompt": "x", "extra": ' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
    b'{"prompt": "x", "seed": 123456789012345678901234567890}',
]


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: repr(content[:40]))
def test_bodies_that_are_not_sound_json_objects_are_refused(content):
    response = API.request("POST", COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "\xff"])
def test_a_body_that_does_not_claim_to_be_json_is_refused_with_the_header_to_send(content_type):
    headers = {} if content_type is None else {"content-type": content_type.encode("latin-1")}
    response = API.request("POST", COMPLETIONS, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 400
    assert "content-type: application/json" in response.json()["error"]["message"]


MODELS = {
    COMPLETIONS: [CompletionRequest],
    CHAT: [ChatCompletionRequest, ChatMessage],
    GENERATE: [GenerateRequest, NativeSampling],
    "/v1/tokenize": [TokenizeRequest],
    "/v1/detokenize": [DetokenizeRequest],
    "/abort_request": [AbortRequest],
}
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 400),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(["user", "assistant", "text", "Hi", "auto", "json_object"]),
)
FIELD_NAMES = sorted({name for models in MODELS.values() for model in models for name in model.model_fields})
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*FIELD_NAMES, "type", "0"]) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(data=st.data(), path=st.sampled_from(sorted(MODELS)))
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_json_whatsoever_is_a_server_error(data, path):
    names = st.sampled_from(sorted(MODELS[path][0].model_fields))
    body = {**MINIMAL[path], **data.draw(st.dictionaries(names, JSON, max_size=3))}
    _check_answer(path, json.dumps(body).encode(errors="surrogatepass"))


@given(
    content=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()),
    path=st.sampled_from(sorted(MODELS)),
)
@settings(max_examples=300, deadline=None)
def test_no_body_whatsoever_is_a_server_error(content, path):
    _check_answer(path, content)


def _check_answer(path: str, content: bytes) -> None:
    response = API.request("POST", path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        error = response.json()["error"]
        assert isinstance(error["message"], str)
        assert len(error["message"]) < 4000
