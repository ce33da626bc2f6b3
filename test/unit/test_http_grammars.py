"""What the routes make of requests for structured output; that answers fit is tested with the sampler."""

import json
from typing import Any

import pytest
from pydantic import BaseModel

from fake_engine import CHAT, COMPLETIONS, HELLO, Api, FakeEngine
from test_http_openai import with_client

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
GENERATE = "/generate"


@pytest.fixture
def api() -> Api:
    return Api()


def grammar_of(api: Api) -> tuple[dict[str, Any], str]:
    """What the last request is held to, and the field that asked for it."""
    grammar = api.engine.requests[-1].sampling.grammar
    assert grammar is not None
    return json.loads(grammar.structural_tag)["format"], grammar.field


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "kind", "key", "value"),
    [
        ({"response_format": NAMED_SCHEMA}, "json_schema", "json_schema", SCHEMA),
        ({"response_format": {"type": "json_object"}}, "json_schema", "json_schema", {"type": "object"}),
        ({"regex": "[ab]+"}, "regex", "pattern", "[ab]+"),
        ({"ebnf": 'root ::= "a"'}, "grammar", "grammar", 'root ::= "a"'),
    ],
    ids=["schema", "object", "regex", "ebnf"],
)
def test_openai_requests_are_held_to_what_they_ask_for(api, path, fields, kind, key, value):
    api.result(path, {"messages": HELLO} | fields if path == CHAT else {"prompt": "Hi"} | fields)
    content, field = grammar_of(api)
    assert (content["type"], content[key]) == (kind, value)
    assert field == next(iter(fields))


@pytest.mark.parametrize("written", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
def test_a_native_schema_may_be_an_object_or_its_text(api, written):
    api.result(GENERATE, {"text": "Hi", "sampling_params": {"json_schema": written}})
    content, field = grammar_of(api)
    assert (content["json_schema"], field) == (SCHEMA, "json_schema")


def test_text_is_held_to_nothing(api):
    api.result(CHAT, {"messages": HELLO, "response_format": {"type": "text"}})
    assert api.engine.requests[0].sampling.grammar is None


class Answer(BaseModel):
    a: int


def test_the_official_client_parses_an_answer():
    api = Api(FakeEngine('{"a": 42}'))

    async def use(client: Any) -> Any:
        return await client.chat.completions.parse(model="any", messages=HELLO, response_format=Answer)

    assert with_client(api, use).choices[0].message.parsed == Answer(a=42)
    assert grammar_of(api)[0]["json_schema"]["properties"]["a"]["type"] == "integer"


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        (CHAT, {"response_format": NAMED_SCHEMA, "regex": "a"}, "response_format", "send one"),
        (COMPLETIONS, {"regex": "a", "ebnf": "b"}, "ebnf", "send one"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema"),
        (
            CHAT,
            {"response_format": {"type": "text", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "no other",
        ),
        (CHAT, {"response_format": {"type": "grammar"}}, "response_format.type", "json_object"),
        (CHAT, {"regex": "a" * 70000}, "regex", "limit of 65536"),
        (GENERATE, {"sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema", "not valid JSON"),
        (GENERATE, {"sampling_params": {"json_schema": "[]"}}, "sampling_params.json_schema", "JSON object"),
        (GENERATE, {"sampling_params": {"json_schema": 5}}, "sampling_params.json_schema", "valid"),
    ],
)
def test_what_does_not_describe_an_answer_is_refused(api, path, fields, param, message):
    smallest = {CHAT: {"messages": HELLO}, COMPLETIONS: {"prompt": "Hi"}, GENERATE: {"text": "Hi"}}
    error = api.error(path, smallest[path] | fields)
    assert (error["param"], message in error["message"]) == (param, True), error
    assert not api.engine.requests
