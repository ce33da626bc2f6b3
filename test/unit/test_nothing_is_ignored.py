"""Everything that is accepted does something: a field of a request or a flag that nobody reads would be a lie."""

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import nibble
from fake_engine import BODIES, CHAT, COMPLETIONS, HELLO, Api, FakeEngine
from nibble.config.resolve import EngineConfig
from nibble.config.server_args import ServerArgs
from nibble.entrypoints.native_protocol import GenerateRequest, NativeSampling
from nibble.entrypoints.openai_protocol import ChatCompletionRequest, CompletionRequest
from nibble.entrypoints.request_model import SamplingFields

GENERATE = "/generate"
ADD = {"type": "function", "function": {"name": "add"}}
STRICT_ADD = {"type": "function", "function": {"name": "add", "strict": True}}
THOUGHTS = "<think>Hm, ll.</think>\n\nHello, 世界! 😀 <|im_start|> and so on, and so on, and so on."
SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "frequency_penalty": 1,
    "presence_penalty": 1,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 1},
    "stop": "ll",
    "stop_regex": "l+",
    "stop_token_ids": [5],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "n": 2,
    "regex": "[a-z]+",
    "ebnf": 'root ::= "a"',
}
OPENAI: dict[str, dict[str, Any]] = {
    **{name: {name: value} for name, value in SAMPLING.items()},
    "min_tokens": {"min_tokens": 2},
    "seed": {"seed": 5},
    "stream": {"stream": True},
    "stream_options": {"stream": True, "stream_options": {"include_usage": True}},
    "data_parallel_rank": {"data_parallel_rank": 1},
    "priority": {"priority": 1},
    "max_tokens": {"max_tokens": 3},
    "response_format": {"response_format": {"type": "json_object"}},
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    COMPLETIONS: {
        **OPENAI,
        "prompt": {"prompt": "Ho"},
        "logprobs": {"logprobs": 1},
        "echo": {"echo": True},
        "best_of": {"best_of": 2},
    },
    CHAT: {
        **OPENAI,
        "messages": {"messages": [{"role": "user", "content": "Ho"}]},
        "max_completion_tokens": {"max_completion_tokens": 3},
        "logprobs": {"logprobs": True},
        "top_logprobs": {"logprobs": True, "top_logprobs": 2},
        "chat_template_kwargs": {"chat_template_kwargs": {"enable_thinking": False}},
        "tools": {"tools": [STRICT_ADD]},
        "tool_choice": {"tools": [ADD], "tool_choice": "required"},
        "parallel_tool_calls": {"tools": [ADD], "parallel_tool_calls": False},
        "separate_reasoning": {"separate_reasoning": False},
    },
    GENERATE: {
        "text": {"text": "Ho"},
        "input_ids": {"text": None, "input_ids": [1, 2]},
        "rid": {"rid": "mine"},
        "stream": {"stream": True},
        "return_logprob": {"return_logprob": True},
        "logprob_start_len": {"return_logprob": True, "logprob_start_len": 0},
        "top_logprobs_num": {"return_logprob": True, "top_logprobs_num": 2},
        "token_ids_logprob": {"return_logprob": True, "token_ids_logprob": [5]},
        "return_text_in_logprobs": {"return_logprob": True, "return_text_in_logprobs": True},
        "data_parallel_rank": {"data_parallel_rank": 1},
        "priority": {"priority": 1},
    },
}
"""For each field of a route the change that asks for it, with what the field needs beside it."""
NATIVE_SAMPLING = {
    **SAMPLING,
    "max_new_tokens": 3,
    "min_new_tokens": 2,
    "sampling_seed": 5,
    "json_schema": {"type": "object"},
}
CHANGES[GENERATE] |= {f"sampling_params.{name}": {"sampling_params": {name: v}} for name, v in NATIVE_SAMPLING.items()}
WITHOUT_EFFECT = {
    "model": "one model is served, under any name",
}


def fields_of(path: str) -> set[str]:
    if path == GENERATE:
        nested = {f"sampling_params.{name}" for name in NativeSampling.model_fields}
        return GenerateRequest.model_fields.keys() - {"sampling_params"} | nested
    return set((CompletionRequest if path == COMPLETIONS else ChatCompletionRequest).model_fields)


def observed(path: str, changes: dict[str, Any]) -> tuple[list[Any], str]:
    """What the engine and the client get, without what differs from call to call."""
    api = Api(FakeEngine(THOUGHTS) if path == CHAT else None, tool_call_parser="hermes", reasoning_parser="qwen3")
    response = api.post(path, {**BODIES[path], **changes})
    assert response.status_code == 200, response.text
    requests = [dataclasses.replace(request, request_id="") for request in api.engine.requests]
    text = re.sub(r"[0-9a-f]{32}", "ID", response.text)
    return requests, re.sub(r'"(created|e2e_latency)":[^,}]*', "", text)


@pytest.mark.parametrize("path", CHANGES)
def test_the_tables_above_name_every_field_that_a_route_accepts(path):
    assert set(CHANGES[path]) == fields_of(path) - WITHOUT_EFFECT.keys()
    assert SAMPLING.keys() == SamplingFields.model_fields.keys()


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, changes in CHANGES.items() for name in changes])
def test_no_accepted_field_is_ignored(path, name):
    changes = CHANGES[path][name]
    needed = {key: value for key, value in changes.items() if key != name.split(".")[0]}
    if name == "input_ids":
        needed = {}
    assert observed(path, changes) != observed(path, needed)


def test_a_request_looks_the_same_when_it_is_sent_again():
    """Otherwise the test above could not fail."""
    for path in BODIES:
        for changes in ({}, {"stream": True}):
            assert observed(path, changes) == observed(path, changes), json.dumps(changes)
    assert observed(CHAT, {"messages": HELLO}) == observed(CHAT, {})


# Flags


def attributes_read() -> set[tuple[str, str]]:
    """The attributes that the package reads, each with the name of what it is read from: ("args", "port")."""
    trees = [ast.parse(path.read_text()) for path in Path(nibble.__file__).parent.rglob("*.py")]
    return {
        (ast.unparse(node.value).split(".")[-1], node.attr)
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


READ = attributes_read()


@pytest.mark.parametrize("flag", [field.name for field in dataclasses.fields(ServerArgs)])
def test_no_flag_is_accepted_and_ignored(flag):
    """It is read, and where it is resolved into a field of EngineConfig, that field is read, too."""
    assert ("args", flag) in READ
    if flag in {field.name for field in dataclasses.fields(EngineConfig)}:
        assert READ & {("config", flag), ("self", flag)}
