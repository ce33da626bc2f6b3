"""What widely used benchmark and evaluation clients send, field for field, and what they read of the answers."""

from typing import Any

import pytest

from fake_engine import CHAT, COMPLETIONS, Api, FakeEngine, parrot
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PROMPT = "Hello, world"
IDS = TOKENIZER.encode(PROMPT)


@pytest.mark.parametrize("prompt", [{"text": PROMPT}, {"input_ids": IDS}], ids=["text", "tokens"])
def test_sglangs_bench_serving_native_backend(prompt):
    sent = {
        **prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": True},
        "stream": True,
        "lora_path": None,
        "return_logprob": False,
        "return_routed_experts": False,
        "logprob_start_len": -1,
    }
    events = Api().events("/generate", sent)
    assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 5]
    assert all(event["text"] for event in events[1:])


def test_sglangs_cache_benchmarks():
    sent = {
        "text": PROMPT,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 5, "ignore_eos": True},
        "stream": True,
        "stream_options": {"include_usage": True},
        "lora_path": "",
        "return_logprob": False,
        "logprob_start_len": -1,
    }
    last = Api().events("/generate", sent)[-1]
    assert last["meta_info"]["prompt_tokens"] == len(IDS)
    assert last["meta_info"]["cached_tokens"] == 3


SGLANG_COMPLETION = {
    "prompt": PROMPT,
    "best_of": 1,
    "max_tokens": 5,
    "temperature": 0.0,
}
VLLM_COMPLETION = {
    "prompt": PROMPT,
    "repetition_penalty": 1.0,
    "max_tokens": 5,
    "logprobs": None,
    "stream_options": {"include_usage": True},
}


@pytest.mark.parametrize("fields", [SGLANG_COMPLETION, VLLM_COMPLETION], ids=["sglang", "vllm"])
def test_completions_backends_of_serving_benchmarks(fields):
    events = Api().events(COMPLETIONS, {"model": "m", **fields, "stream": True, "ignore_eos": True})
    if "stream_options" in fields:
        usage = events.pop()
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == 5
        assert usage["usage"]["prompt_tokens"] == len(IDS)
    # SGLang's reads the first choice of every event.
    assert all("text" in event["choices"][0] for event in events)
    assert any(event["choices"][0]["text"] for event in events)


SGLANG_CHAT = {
    "messages": [{"role": "user", "content": PROMPT}],
    "temperature": 0.0,
}
VLLM_CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
    "stream_options": {"include_usage": True},
}


@pytest.mark.parametrize("fields", [SGLANG_CHAT, VLLM_CHAT], ids=["sglang", "vllm"])
def test_chat_backends_of_serving_benchmarks(fields):
    sent = {"model": "m", **fields, "max_completion_tokens": 5, "stream": True, "ignore_eos": True}
    events = Api().events(CHAT, sent)
    if "stream_options" in fields:
        assert events.pop()["usage"]["completion_tokens"] == 5
    assert any(event["choices"][0]["delta"].get("content") for event in events)


def test_lm_evals_loglikelihoods():
    """It sends token ids, several prompts at once, and reads what lies between the context and the last token."""
    sent = {
        "model": "m",
        "prompt": [IDS, IDS[:4]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = sorted(Api().result(COMPLETIONS, sent)["choices"], key=lambda choice: choice["index"])
    for choice, prompt in zip(choices, sent["prompt"], strict=True):
        context = 2
        continuation = choice["logprobs"]["token_logprobs"][context:-1]
        assert continuation == [-0.5] * (len(prompt) - context)
        tops = choice["logprobs"]["top_logprobs"][context:-1]
        is_greedy = all(logprob == max(top.values()) for logprob, top in zip(continuation, tops, strict=True))
        assert is_greedy


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_lm_evals_generations(path):
    sent: dict[str, Any] = {
        "model": "m",
        "max_tokens": 50,
        "temperature": 0,
        "stop": ["\n\n", "Q:", "<|im_end|>"],
        "seed": 1234,
    }
    if path == COMPLETIONS:
        for prompt in (PROMPT, [PROMPT], [IDS]):
            answer = Api(FakeEngine(parrot)).result(path, {**sent, "prompt": prompt})
            assert [choice["text"] for choice in answer["choices"]] == [PROMPT]
        answer = Api(FakeEngine(parrot)).result(path, {**sent, "prompt": [PROMPT, "Hi"]})
        assert [choice["text"] for choice in answer["choices"]] == [PROMPT, "Hi"]
    else:
        messages = [{"role": "user", "content": PROMPT, "type": "text"}]
        assert Api().result(path, {**sent, "messages": messages})["choices"][0]["message"]["content"]
