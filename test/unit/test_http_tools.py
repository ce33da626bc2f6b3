"""Function calling and reasoning over HTTP, through the official client."""

import json
from typing import Any

import openai
import pytest

from fake_engine import CHAT, HELLO, Api, FakeEngine
from nibble.tokenizer.tokenizer import Tokenizer
from test_http_openai import chat, with_client
from tiny_tokenizer import byte_level_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
CALLS = """Let me see.
<tool_call>
{"name": "weather", "arguments": {"city": "Rome"}}
</tool_call>
<tool_call>
{"name": "add", "arguments": {"a": 1}}
</tool_call>"""
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content or '' }}{{ m.reasoning_content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ WRITTEN }}]{% endfor %}"
    "{{ m.tool_call_id or '' }}\n{% endfor %}assistant:"
)


def api_with(reply: str, template: str = TEMPLATE.replace("WRITTEN", "call.function.arguments | tojson")) -> Api:
    engine = FakeEngine(reply)
    engine.tokenizer = Tokenizer(byte_level_tokenizer(template))
    engine.context_length = 2000
    return Api(engine, tool_call_parser="hermes", reasoning_parser="qwen3")


def prompt_of(api: Api) -> str:
    return api.engine.tokenizer.decode(api.engine.requests[-1].input_ids, skip_special_tokens=False)


def test_an_answer_may_hold_text_and_several_calls():
    api = api_with(CALLS)
    answer = chat(api, tools=[WEATHER, ADD])
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [("function", "weather"), ("function", "add")]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Rome"}, {"a": 1}]
    assert len({call.id for call in calls}) == 2
    assert '"description": "What it is like outside."' in prompt_of(api)
    assert api.engine.requests[0].sampling.grammar is None, "auto leaves the model free"


def test_the_official_clients_stream_helper_puts_the_calls_together():
    api = api_with(CALLS)

    async def use(client: openai.AsyncOpenAI) -> Any:
        async with client.chat.completions.stream(model="any", messages=HELLO, tools=[WEATHER, ADD]) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    (choice,) = with_client(api, use).choices
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    assert [call.function.arguments for call in choice.message.tool_calls] == ['{"city": "Rome"}', '{"a": 1}']


def test_a_streamed_call_has_its_id_and_name_once_and_its_arguments_bit_by_bit():
    chunks = chat(api_with(CALLS), tools=[WEATHER, ADD], stream=True)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    for index, name in enumerate(("weather", "add")):
        first, *others = (delta for delta in deltas if delta.index == index)
        assert (first.type, first.function.name, first.function.arguments) == ("function", name, "")
        assert first.id.startswith("call_")
        assert all(other.id is None and other.function.name is None for other in others)
        assert len(others) > 1
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]


def test_a_call_that_is_cut_off_by_the_limit_says_so():
    (choice,) = chat(api_with(CALLS), tools=[WEATHER], max_tokens=25).choices
    assert choice.finish_reason == "length"


def test_tools_that_must_not_be_used_are_neither_shown_nor_looked_for():
    api = api_with(CALLS)
    (choice,) = chat(api, tools=[WEATHER, ADD], tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALLS, None, "stop")
    assert "weather" not in prompt_of(api)


def grammar(api: Api, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The field that is to blame for the grammar, and the grammar."""
    chat(api, **fields)
    found = api.engine.requests[-1].sampling.grammar
    return found.field, json.loads(found.structural_tag)["format"]["elements"][1]


def test_a_call_that_must_be_made_is_held_to_its_schema():
    api = api_with(CALLS)
    field, required = grammar(api, tools=[WEATHER, ADD], tool_choice="required")
    assert (field, required["at_least_one"], required["stop_after_first"]) == ("tool_choice", True, False)
    assert [json.dumps(tag["begin"]).count("weather") for tag in required["tags"]] == [1, 0]
    named = {"type": "function", "function": {"name": "weather"}}
    _, one = grammar(api, tools=[WEATHER, ADD], tool_choice=named, parallel_tool_calls=False)
    assert [tag["content"]["json_schema"] for tag in one["tags"]] == [WEATHER["function"]["parameters"]]
    assert one["stop_after_first"]


def test_one_call_only_and_strict_arguments_are_held_to_while_the_model_is_free_to_call():
    api = api_with(CALLS)
    field, single = grammar(api, tools=[WEATHER], parallel_tool_calls=False)
    assert (field, single["type"], single["stop_after_first"]) == ("parallel_tool_calls", "triggered_tags", True)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    field, free = grammar(api, tools=[strict, ADD])
    schemas = [tag["content"]["json_schema"] for tag in free["tags"]]
    assert (field, schemas) == ("tools", [WEATHER["function"]["parameters"], {"type": "object"}])


def test_an_answer_in_a_format_may_be_a_call_instead():
    field, either = grammar(api_with(CALLS), tools=[WEATHER], response_format={"type": "json_object"})
    assert field == "response_format"
    assert [element["type"] for element in either["elements"]] == ["json_schema", "tags_with_separator"]


CONVERSATION = [
    *HELLO,
    {
        "role": "assistant",
        "reasoning_content": "a tool",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": "é"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("call.function.arguments | tojson", '{"a": "é"}'),
        ("call.function.arguments if call.function.arguments is string else 'object'", "object"),
        ("call.function.arguments", '{"a": "é"}'),
        ("' ' + call.function.arguments + ' '", ' {"a": "é"} '),
        ("'' ~ call.function.arguments", '{"a": "é"}'),
        ("call.function.arguments.a", "é"),
    ],
)
def test_earlier_calls_and_their_results_reach_the_template_as_it_wants_them(written, expected):
    api = api_with("3", TEMPLATE.replace("WRITTEN", written))
    api.result(CHAT, {"messages": CONVERSATION, "tools": [ADD]})
    assert f"assistant: a tool[add {expected}]\ntool: 3c1\nassistant:" in prompt_of(api)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{ m.role + m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}", "assistantadd"),
        ("{{ 'text' if '</think>' in m.content }}{% for c in m.tool_calls or [] %}{{ c.id }}{% endfor %}", "c1"),
        (
            "{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}"
            "{% endfor %}{% else %}{{ m.content }}{% endif %}",
            'add{"a": "é"}',
        ),
        (
            "{% if loop.last %}{{ raise_exception('unanswered') }}{% endif %}"
            "{% if m.content is none %}{{ m.tool_calls[0].function.name }}{% endif %}",
            "add",
        ),
        ("{{ m.content }}", ""),
    ],
    ids=[
        "joins the content",
        "looks into the content",
        "shows calls instead of content",
        "wants calls to be answered",
        "knows no calls",
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_a_message_that_only_calls_has_the_content_that_the_template_can_take(content, written, expected):
    """The official client sends back the content that it got: null. DeepSeek's templates ask for it, Qwen3's can't."""
    template = "{% for m in messages %}{% if m.role == 'assistant' %}" + written + "{% endif %}{% endfor %}!"
    api = api_with("3", template)
    call = CONVERSATION[1]["tool_calls"]
    api.result(
        CHAT, {"messages": [*HELLO, {"role": "assistant", "content": content, "tool_calls": call}, CONVERSATION[2]]}
    )
    assert prompt_of(api) == expected + "!"


def test_it_is_known_whether_a_template_tells_the_model_of_functions():
    for template, shows in (
        (TEMPLATE, True),
        ("{{ messages[0].content }}", False),
        ("{{ raise_exception('') }}", True),  # this conversation is refused, which says nothing of others
    ):
        assert Tokenizer(byte_level_tokenizer(template)).template_shows_tools() == shows


@pytest.mark.parametrize("text", ["[1]", "{", "5"])
def test_arguments_of_earlier_calls_are_json_objects(text):
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": text}}
    error = Api().error(CHAT, {"messages": [{"role": "assistant", "tool_calls": [call]}]})
    assert error["param"] == "messages.0.tool_calls.0.function.arguments"


# Reasoning


def test_thoughts_are_apart_from_the_answer():
    api = api_with("<think>\nWell.\n</think>\n\nYes.")
    (choice,) = chat(api).choices
    assert (choice.message.reasoning_content, choice.message.content) == ("Well.", "Yes.")
    deltas = [chunk.choices[0].delta for chunk in chat(api, stream=True)]
    thoughts = [delta.model_extra.get("reasoning_content") for delta in deltas]
    assert "".join(filter(None, thoughts)) == "Well."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


def test_thoughts_stay_in_the_answer_on_request():
    (choice,) = chat(api_with("<think>a</think>b"), extra_body={"separate_reasoning": False}).choices
    assert choice.message.content == "<think>a</think>b"


def test_a_prompt_that_ends_with_thoughts_asks_for_none():
    template = "{{ messages[0].content }}<think></think>\n"
    assert chat(api_with("<think>", template)).choices[0].message.content == "<think>"


def test_an_answer_that_is_all_thoughts_has_no_content():
    (choice,) = chat(api_with("<think>on and on", TEMPLATE)).choices
    assert (choice.message.content, choice.message.reasoning_content) == (None, "on and on")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools", "two functions alike"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", "pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tools": [ADD] * 129}, "tools", "at most 128"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "not among"),
        ({"tools": [ADD], "tool_choice": "required", "regex": "a"}, "regex", "exclude each other"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages.0.tool_call_id", "'tool'"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content", "required"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, param, message):
    api = api_with("x")
    error = api.error(CHAT, {"messages": HELLO} | fields)
    assert error["param"] == param
    assert message in error["message"]


def test_a_server_without_the_parsers_refuses_what_needs_them():
    for fields, flag in (
        ({"tools": [ADD]}, "--tool-call-parser"),
        ({"separate_reasoning": True}, "--reasoning-parser"),
    ):
        error = Api().error(CHAT, {"messages": HELLO} | fields)
        assert error["param"] == next(iter(fields)) and flag in error["message"]
