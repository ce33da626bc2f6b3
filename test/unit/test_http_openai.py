"""The OpenAI routes, through the official client wherever it can express the request."""

import json
from typing import Any

import httpx
import openai
import pytest

from fake_engine import REPLY, Api, FakeEngine, parrot, sse_events
from nibble.entrypoints.openai_protocol import ChatCompletionRequest, CompletionRequest
from nibble.utils.errors import EngineDeadError
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]
LONG = {"max_tokens": 100}
NUM_REPLY_TOKENS = len(TOKENIZER.encode(REPLY)) + 1


@pytest.fixture
def api() -> Api:
    return Api()


@pytest.fixture
def parroting() -> Api:
    return Api(FakeEngine(parrot))


def with_client(api: Api, use: Any) -> Any:
    """Runs `use` with the official client, connected to the app."""

    async def connect() -> Any:
        async with api.http_client() as http:
            return await use(
                openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http, max_retries=0)
            )

    return api.run(connect())


def chat(api: Api, **options: Any) -> Any:
    async def use(client: openai.AsyncOpenAI) -> Any:
        answer = await client.chat.completions.create(model="any", messages=HELLO, **options)
        return [chunk async for chunk in answer] if options.get("stream") else answer

    return with_client(api, use)


def complete(api: Api, **options: Any) -> Any:
    async def use(client: openai.AsyncOpenAI) -> Any:
        answer = await client.completions.create(model="any", **{"prompt": "Hi", **options})
        return [chunk async for chunk in answer] if options.get("stream") else answer

    return with_client(api, use)


# Chat completions


def test_a_chat_is_answered_with_usage(api):
    answer = chat(api)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "tiny/model")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    prompt = TOKENIZER.apply_chat_template(HELLO)
    assert api.engine.requests[0].input_ids == prompt
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == NUM_REPLY_TOKENS
    assert answer.usage.total_tokens == len(prompt) + NUM_REPLY_TOKENS
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_a_chat_stream_has_the_role_first_then_deltas_then_one_finish(api):
    chunks = chat(api, stream=True)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(chunks) - 1)
    assert "".join(delta.content or "" for delta in deltas) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len(chunks) > 10, "text arrives bit by bit"


def test_the_usage_chunk_comes_last_and_only_when_asked_for(api):
    *others, last = chat(api, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == chat(api).usage
    assert all(chunk.usage is None and chunk.choices for chunk in others)


def test_a_chat_may_use_the_rest_of_the_context(api):
    chat(api)
    (request,) = api.engine.requests
    assert request.sampling.max_new_tokens == api.engine.context_length - len(request.input_ids)
    assert request.sampling.temperature == 1.0


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit_work(api, field):
    answer = chat(api, **{field: 3})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_text_parts_are_joined_by_newlines_and_developer_messages_are_system_messages(api):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    api.result(CHAT, {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]})
    rendered = TOKENIZER.decode(api.engine.requests[0].input_ids, skip_special_tokens=False)
    assert rendered == ("<|im_start|>system\nx<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n")


def test_template_variables_reach_the_template(api):
    chat(api, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    rendered = TOKENIZER.decode(api.engine.requests[0].input_ids, skip_special_tokens=False)
    assert rendered.endswith("<think></think>")


def test_a_long_conversation_is_encoded_like_a_short_one(api):
    api.engine.context_length = 10**6
    messages = [{"role": "user", "content": "word " * 5000}]
    api.result(CHAT, {"messages": messages, "max_tokens": 1})
    assert api.engine.requests[0].input_ids == TOKENIZER.apply_chat_template(messages)


def test_several_choices_are_generated_at_once_with_consecutive_seeds(api):
    answer = chat(api, n=3, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [request.sampling.sampling_seed for request in api.engine.requests] == [5, 6, 7]
    assert all(request.sampling.n == 1 for request in api.engine.requests)
    assert len({request.request_id for request in api.engine.requests}) == 3
    assert answer.usage.prompt_tokens == len(api.engine.requests[0].input_ids)
    assert answer.usage.completion_tokens == 3 * NUM_REPLY_TOKENS


def test_seeds_of_choices_wrap_around_at_64_bits(api):
    chat(api, n=2, seed=2**63 - 1)
    assert [request.sampling.sampling_seed for request in api.engine.requests] == [2**63 - 1, -(2**63)]


def test_streamed_choices_each_have_a_role_their_text_and_one_finish(api):
    chunks = chat(api, stream=True, n=3)
    for index in range(3):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in choices) == REPLY
        assert [choice.delta.role for choice in choices].count("assistant") == 1
        assert [choice.finish_reason for choice in choices].count("stop") == 1
        assert choices[-1].finish_reason == "stop"


def test_chat_logprobs_give_tokens_bytes_and_the_likeliest_tokens(api):
    answer = chat(api, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == NUM_REPLY_TOKENS
    assert bytes(byte for token in content for byte in token.bytes).decode() == REPLY + "<|im_end|>"
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 2 for token in content)
    assert content[0].top_logprobs[0].token == content[0].token
    assert content[0].top_logprobs[1].logprob == -9999.0, "minus infinity is not JSON"
    assert any(token.token.startswith("bytes:\\x") for token in content), "half characters are shown by their bytes"


def test_streamed_chat_logprobs_add_up_to_the_whole(api):
    chunks = chat(api, stream=True, logprobs=True, top_logprobs=1)
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert streamed == chat(api, logprobs=True, top_logprobs=1).choices[0].logprobs.content


def test_without_asking_there_are_no_logprobs(api):
    assert chat(api).choices[0].logprobs is None
    assert not api.engine.requests[0].return_logprob


def test_a_stop_string_ends_the_text_before_it(api):
    answer = api.result(CHAT, {"messages": HELLO, "stop": ["</div>", "😀"]})
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "Hello, 世界 "
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", "😀")


# Completions


def test_a_completion_is_answered_with_usage(api):
    answer = complete(api, **LONG)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (REPLY, "stop")
    assert answer.usage.completion_tokens == NUM_REPLY_TOKENS


def test_a_completion_has_sixteen_tokens_unless_it_asks_for_more(api):
    answer = complete(api)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 16)


def test_the_default_length_shrinks_to_what_the_context_has_left(api):
    api.engine.context_length = len(TOKENIZER.encode("Hi")) + 5
    assert complete(api).usage.completion_tokens == 5


def test_streamed_completion_deltas_add_up_with_one_finish(api):
    chunks = complete(api, stream=True, **LONG)
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_completion_usage_is_streamed_on_request(api):
    *others, last = api.events(COMPLETIONS, {"prompt": "Hi", "stream_options": {"include_usage": True}, **LONG})
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], NUM_REPLY_TOKENS)
    assert all(chunk["usage"] is None for chunk in others)
    assert all("usage" not in chunk for chunk in api.events(COMPLETIONS, {"prompt": "Hi"}))


TEXTS = ["first", "second text", "third 世界"]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Hello, world", ["Hello, world"]),
        (TEXTS, TEXTS),
        (TOKENIZER.encode("one"), ["one"]),
        ([TOKENIZER.encode(text) for text in TEXTS], TEXTS),
    ],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
def test_prompts_may_be_texts_or_tokens_alone_or_in_lists(parroting, prompt, texts):
    answer = complete(parroting, prompt=prompt, **LONG)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))
    streamed = complete(parroting, prompt=prompt, stream=True, **LONG)
    for index, text in enumerate(texts):
        assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices[0].index == index) == text


def test_choices_of_several_prompts_are_in_the_order_of_the_prompts(parroting):
    answer = complete(parroting, prompt=TEXTS, n=2, **LONG)
    assert [choice.text for choice in answer.choices] == [text for text in TEXTS for _ in range(2)]
    prompt_tokens = sum(len(TOKENIZER.encode(text)) for text in TEXTS)
    assert answer.usage.prompt_tokens == prompt_tokens
    assert answer.usage.completion_tokens == 2 * (prompt_tokens + len(TEXTS))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi, ", TOKENIZER.encode("Hi, ")], ids=["text", "tokens"])
def test_echo_begins_every_choice_with_its_prompt(api, prompt, stream):
    answer = complete(api, prompt=prompt, echo=True, n=2, stream=stream, **LONG)
    for index in range(2):
        chunks = answer if stream else [answer]
        texts = [choice.text for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(texts) == "Hi, " + REPLY


def test_completion_logprobs_are_in_the_legacy_format(api):
    logprobs = complete(api, logprobs=1, **LONG).choices[0].logprobs
    ends = [*logprobs.text_offset[1:], len(REPLY)]
    whole = [
        (token, REPLY[start:end])
        for token, start, end in zip(logprobs.tokens, logprobs.text_offset, ends, strict=True)
        if not token.startswith(("bytes:", "<|"))
    ]
    assert all(token == text for token, text in whole), "offsets say where in the text a token begins"
    assert len(whole) > 10
    assert logprobs.tokens[-1] == "<|im_end|>"
    assert logprobs.token_logprobs == [-0.5] * NUM_REPLY_TOKENS
    assert logprobs.top_logprobs == [{token: -0.5} for token in logprobs.tokens]


def test_special_tokens_that_are_left_out_take_no_room_in_the_text():
    api = Api(FakeEngine("a<|endoftext|>b"))
    answer = complete(api, logprobs=0).choices[0]
    assert (answer.text, answer.logprobs.tokens) == ("ab", ["a", "<|endoftext|>", "b", "<|im_end|>"])
    assert answer.logprobs.text_offset == [0, 1, 1, 2]
    answer = complete(api, logprobs=0, extra_body={"skip_special_tokens": False}).choices[0]
    assert answer.logprobs.text_offset == [0, 1, 14, 15]


def test_the_sampled_token_is_among_the_likeliest_even_when_none_are_asked_for(api):
    logprobs = complete(api, logprobs=0).choices[0].logprobs
    assert logprobs.top_logprobs == [{token: -0.5} for token in logprobs.tokens]
    assert api.engine.requests[0].top_logprobs_num == 0


def test_streamed_completion_logprobs_add_up_to_the_whole(api):
    whole = complete(api, logprobs=2, **LONG).choices[0].logprobs
    chunks = complete(api, logprobs=2, stream=True, **LONG)
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        pieces = [getattr(chunk.choices[0].logprobs, field) for chunk in chunks]
        assert [entry for piece in pieces for entry in piece] == getattr(whole, field)


def test_every_sampling_field_reaches_the_engine(api):
    fields = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {"3": -100, "4": 2.5},
        "stop": ["a", "b"],
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    renamed = {"seed": 11, "min_tokens": 2, "max_tokens": 9, "data_parallel_rank": 1}
    api.result(COMPLETIONS, {"prompt": "Hi", **fields, **renamed})
    (request,) = api.engine.requests
    expected = fields | {"logit_bias": {3: -100.0, 4: 2.5}, "stop": ("a", "b"), "stop_token_ids": (5, 6)}
    assert {name: getattr(request.sampling, name) for name in fields} == expected
    assert (request.sampling.sampling_seed, request.sampling.min_new_tokens) == (11, 2)
    assert (request.sampling.max_new_tokens, request.data_parallel_rank) == (9, 1)


def test_null_means_the_default_for_every_field(api):
    for path, model, required in (
        (COMPLETIONS, CompletionRequest, {"prompt": "Hi"}),
        (CHAT, ChatCompletionRequest, {"messages": HELLO}),
    ):
        nulls = dict.fromkeys(model.model_fields) | required
        api.result(path, nulls)
        api.result(path, required)
        with_nulls, without = api.engine.requests[-2:]
        assert with_nulls.sampling == without.sampling


def test_the_models_route_names_the_one_model_and_any_name_is_served(api):
    listed = with_client(api, lambda client: _models(client))
    assert [model.id for model in listed] == ["tiny/model"]
    assert api.get("/v1/models/tiny/model").json()["max_model_len"] == api.engine.context_length
    assert api.get("/v1/models/other").status_code == 404
    assert api.result(COMPLETIONS, {"prompt": "Hi", "model": "gpt-4"})["model"] == "tiny/model"


async def _models(client: openai.AsyncOpenAI) -> list[Any]:
    return [model async for model in client.models.list()]


def test_errors_reach_the_official_client_as_its_own(api):
    with pytest.raises(openai.BadRequestError, match="temperature must be between 0 and 100, got -1"):
        chat(api, temperature=-1)
    api.engine.current_state = "draining"
    with pytest.raises(openai.InternalServerError, match="draining"):
        chat(api)


def test_an_error_in_the_stream_reaches_the_official_client(api):
    api.engine.fail_after = 2
    with pytest.raises(openai.APIError, match="NaN"):
        chat(api, stream=True)


# Failures of the engine


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "Hi"})])
def test_a_generation_that_the_engine_aborts_is_an_error(api, path, body):
    api.engine.fail_after = 2
    error = api.error(path, body, status=500)
    assert (error["message"], error["type"], error["code"]) == (
        "the row became NaN",
        "server_error",
        "generation_failed",
    )


@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "Hi"})])
def test_a_stream_that_fails_ends_with_an_error_event(api, path, body):
    api.engine.fail_after = 2
    *chunks, last = _raw_events(api.post(path, {**body, "stream": True}))
    assert chunks
    assert json.loads(last)["error"]["message"] == "the row became NaN"


def test_one_failed_choice_stops_the_others(api):
    api.engine.fail_after, api.engine.failing_suffix = 2, "-1"
    api.error(COMPLETIONS, {"prompt": "Hi", "n": 3}, status=500)
    first, _, last = (request.request_id for request in api.engine.requests)
    assert set(api.engine.cut_short) == {first, last}


def test_a_stream_that_fails_before_it_begins_has_an_error_status(api):
    api.engine.current_state = "draining"
    response = api.post(CHAT, {"messages": HELLO, "stream": True, "n": 2})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"


def test_a_dead_engine_in_the_middle_of_a_stream_is_an_error_event(api):
    api.engine.fail_after, api.engine.failure = 2, EngineDeadError("rank 3 died")
    events = _raw_events(api.post(CHAT, {"messages": HELLO, "stream": True}))
    assert json.loads(events[-1])["error"]["code"] == "engine_dead"


def test_an_unforeseen_failure_is_told_without_its_details(api):
    api.engine.fail_after, api.engine.failure = 2, KeyError("secret path")
    events = _raw_events(api.post(CHAT, {"messages": HELLO, "stream": True}))
    assert json.loads(events[-1])["error"]["message"] == "internal server error"


def _raw_events(response: httpx.Response) -> list[str]:
    assert response.status_code == 200
    return sse_events(response.text)
