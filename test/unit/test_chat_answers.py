"""Thoughts and function calls in the text of a model: whichever way the text is cut, the same is found in it."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grammar_cases import begin
from nibble.config.server_args import ServerArgs
from nibble.entrypoints.chat_answer import ChatAnswerParser, merged_tool_calls
from nibble.entrypoints.reasoning import REASONING_FORMATS, ReasoningParser, Start, after_thoughts
from nibble.entrypoints.tools.formats import TOOL_CALL_FORMATS, FunctionTool
from nibble.entrypoints.tools.parser import ToolCallParser
from nibble.structured_output.grammar import json_schema_format
from nibble.structured_output.state import GrammarState
from tiny_tokenizer import tiny_tokenizer

BAR, BLANK = "\N{FULLWIDTH VERTICAL LINE}", "\N{LOWER ONE EIGHTH BLOCK}"
ARGUMENTS = '{"city": "São {Paulo}", "nested": {"list": [1, "}\\"]"]}}'
NAMES = ("weather", "add")


def deepseek(*calls: tuple[str, str], version: str = "deepseekv3") -> str:
    def marker(words: str) -> str:
        return f"<{BAR}{words.replace(' ', BLANK)}{BAR}>"

    written = [
        f"{marker('tool call begin')}function{marker('tool sep')}{name}\n```json\n{arguments}\n```"
        if version == "deepseekv3"
        else f"{marker('tool call begin')}{name}{marker('tool sep')}{arguments}"
        for name, arguments in calls
    ]
    end = marker("tool call end")
    inner = f"{end}\n".join(written)
    return f"{marker('tool calls begin')}{inner}{end}{marker('tool calls end')}"


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls
    )


WRITERS = {
    "qwen25": hermes,
    "deepseekv3": deepseek,
    "deepseekv31": lambda *calls: deepseek(*calls, version="deepseekv31"),
}


def parse(text: str, parser: str | None, start: Start | None = None, cuts: tuple[int, ...] = ()) -> dict[str, Any]:
    """What is found in a text that arrives in pieces."""
    answer = ChatAnswerParser(
        None if start is None else ReasoningParser(start),
        None if parser is None else ToolCallParser(TOOL_CALL_FORMATS[parser], NAMES),
    )
    places = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    deltas = [answer.push(text[a:b], is_last=False) for a, b in itertools.pairwise(places)]
    deltas.append(answer.push("", is_last=True))
    calls = merged_tool_calls([call for delta in deltas for call in delta.calls])
    return {
        "reasoning": "".join(delta.reasoning for delta in deltas),
        "content": "".join(delta.content for delta in deltas),
        "calls": [(call["function"]["name"], call["function"]["arguments"]) for call in calls],
    }


CUTS = st.lists(st.integers(0, 400), max_size=40).map(tuple)


@pytest.mark.parametrize("parser", WRITERS)
@given(cuts=CUTS)
@settings(max_examples=60, deadline=None)
def test_calls_are_found_wherever_the_text_is_cut(parser, cuts):
    calls = (("weather", ARGUMENTS), ("add", "{}"))
    text = f"Let me <look> it up.\n{WRITERS[parser](*calls)}"
    expected = {"reasoning": "", "content": "Let me <look> it up.", "calls": list(calls)}
    assert parse(text, parser, cuts=cuts) == expected


@pytest.mark.parametrize("parser", WRITERS)
def test_arguments_arrive_while_they_are_written(parser):
    answer = ToolCallParser(TOOL_CALL_FORMATS[parser], NAMES)
    deltas = [answer.push(character) for character in WRITERS[parser](("weather", ARGUMENTS))]
    calls = [call for delta in deltas for call in delta.calls]
    assert calls[0].name == "weather" and calls[0].arguments == ""
    assert [call.arguments for call in calls[1:]] == list(ARGUMENTS)


NO_CALLS = [
    "plain text, with < and <tool and </tool_call>  ",
    "<tool_call>\nnot JSON\n</tool_call> more",
    '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "weather"',
    "<tool_call>",
    "ends in the middle of a <tool_ca",
    "  leading and trailing space \n",
]


@pytest.mark.parametrize("text", NO_CALLS)
@given(cuts=CUTS)
@settings(max_examples=20, deadline=None)
def test_what_is_no_call_of_a_known_function_stays_text_to_the_letter(text, cuts):
    assert parse(text, "hermes", cuts=cuts) == {"reasoning": "", "content": text, "calls": []}


@given(text=st.text(st.sampled_from('<tool_call>/{}": \nname'), max_size=60), cuts=CUTS)
@settings(max_examples=150, deadline=None)
def test_no_text_without_a_call_is_changed(text, cuts):
    assert parse(text, "hermes", cuts=cuts)["content"] == text


def test_a_call_that_is_cut_off_keeps_what_there_is():
    assert parse('<tool_call>\n{"name": "add", "arguments": {"a": 1', "qwen25")["calls"] == [("add", '{"a": 1')]


def test_text_goes_on_behind_calls():
    text = f"a{hermes(('add', '{}'))}\n\n b c"
    assert parse(text, "qwen25", cuts=tuple(range(len(text)))) == {
        "reasoning": "",
        "content": "ab c",
        "calls": [("add", "{}")],
    }


# Thoughts


@pytest.mark.parametrize(
    ("start", "text", "reasoning", "content"),
    [
        ("thinking", "I think\n\nso.\n</think>\n\nYes. ", "I think\n\nso.", "Yes. "),
        ("thinking", "<think>\nI think</think>Yes", "I think", "Yes"),
        ("thinking", "no end of it </thin", "no end of it </thin", ""),
        ("thinking", "", "", ""),
        ("either", "\n<think>\nhm\n</think>\n\nYes", "hm", "Yes"),
        ("either", "<think>", "", ""),
        ("either", " Yes <think>", "", " Yes <think>"),
        ("either", "<thin ice", "", "<thin ice"),
        ("answering", "<think> is a word", "", "<think> is a word"),
        ("thinking", "a</think>b</think>c", "a", "b</think>c"),
    ],
)
@given(cuts=CUTS)
@settings(max_examples=20, deadline=None)
def test_thoughts_are_told_from_the_answer(start, text, reasoning, content, cuts):
    assert parse(text, None, start, cuts) == {"reasoning": reasoning, "content": content, "calls": []}


def test_thoughts_hold_no_calls_and_calls_follow_them():
    text = f"{hermes(('add', '{}'))}</think>{hermes(('weather', '{}'))}"
    found = parse(text, "hermes", "thinking")
    assert found["calls"] == [("weather", "{}")]
    assert found["reasoning"] == hermes(("add", "{}"))


@pytest.mark.parametrize(
    ("name", "prompt_end", "start"),
    [
        ("deepseek-r1", "<assistant><think>\n", "thinking"),
        ("deepseek-r1", "<assistant>", "thinking"),
        ("deepseek-r1", "<think>\n\n</think>\n\n", "answering"),
        ("qwen3", "<assistant>", "either"),
        ("qwen3", "<think>\n\n</think>\n\n", "answering"),
        ("qwen3", "<assistant><think>\n", "thinking"),
        ("qwen3-thinking", "<assistant>", "thinking"),
    ],
)
def test_the_end_of_the_prompt_says_how_the_answer_begins(name, prompt_end, start):
    assert REASONING_FORMATS[name].start(prompt_end) == start


# Grammars


def accepts(state: GrammarState, text: str) -> bool:
    tokens = tiny_tokenizer().encode(text, add_special_tokens=False)
    return all(map(state.accept, tokens)) and state.accept(*tiny_tokenizer().eos_token_ids)


TOOLS = [
    FunctionTool("weather", {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}, True),
    FunctionTool("add", {"type": "object", "properties": {"a": {"type": "integer"}}}, False),
]
GOOD, OTHER = ("weather", '{"city": "Rome"}'), ("add", '{"whatever": 1}')
BAD = ("weather", '{"town": "Rome"}')


@pytest.mark.parametrize("parser", WRITERS)
def test_the_grammar_of_calls_is_what_the_parser_reads(parser):
    write, calls = WRITERS[parser], TOOL_CALL_FORMATS[parser]
    required = calls.calls(TOOLS, one_only=False)
    assert accepts(begin(required), write(GOOD))
    assert accepts(begin(required), write(GOOD, OTHER))
    assert not accepts(begin(required), write(BAD))
    assert not accepts(begin(required), "text")
    assert not accepts(begin(calls.calls(TOOLS, one_only=True)), write(GOOD, OTHER))
    free = calls.text_with_calls(TOOLS, one_only=True)
    assert accepts(begin(free), "just text")
    assert accepts(begin(free), "text\n" + write(GOOD))
    assert not accepts(begin(free), "text\n" + write(BAD))
    assert not accepts(begin(free), write(GOOD, OTHER))


def test_an_answer_is_held_to_its_format_only_behind_the_thoughts():
    json_object = json_schema_format({"type": "object"})
    assert accepts(begin(after_thoughts(json_object, "thinking")), "{ hm</think>\n\n{}")
    assert not accepts(begin(after_thoughts(json_object, "thinking")), "{}")
    for text in ("<think>{ hm</think>{}", "<think>hm</think>\n\n{}", "{}"):
        assert accepts(begin(after_thoughts(json_object, "either")), text)
    assert not accepts(begin(after_thoughts(json_object, "answering")), "<think>hm</think>{}")


def test_the_flags_offer_the_formats_there_are():
    fields = {field: ServerArgs.__dataclass_fields__[field].metadata["choices"] for field in _FLAGS}
    assert fields == {field: tuple(names) for field, names in _FLAGS.items()}


_FLAGS = {"tool_call_parser": list(TOOL_CALL_FORMATS), "reasoning_parser": list(REASONING_FORMATS)}
