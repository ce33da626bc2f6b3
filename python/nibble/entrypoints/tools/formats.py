"""How models write function calls: what to look for in their text, and the grammars that make them write so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from nibble.structured_output.grammar import Format, json_schema_format, tag_format


@dataclass(frozen=True)
class FunctionTool:
    """A function that a request offers. Arguments that are `strict` are held to their schema."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool


@dataclass(frozen=True)
class ToolCallFormat:
    """Text, then `begin`, then calls. A call is what `header` matches, its arguments as JSON, and `call_end`.

    `section_end` follows the last call where one `begin` opens a section for all of them; None where each call has a
    `begin` of its own. `call_begin` and `call_close` are what a grammar puts around the arguments.
    """

    begin: str
    header: regex.Pattern[str]
    call_begin: str
    call_close: str
    call_end: str
    section_end: str | None

    def calls(self, tools: Sequence[FunctionTool], one_only: bool) -> Format:
        """One call or more, and nothing else."""
        calls: Format = {
            "type": "tags_with_separator",
            "tags": [self._call(tool) for tool in tools],
            "separator": "\n",
            "at_least_one": True,
            "stop_after_first": one_only,
        }
        return calls if self.section_end is None else tag_format(self.begin, calls, self.section_end)

    def text_with_calls(self, tools: Sequence[FunctionTool], one_only: bool) -> Format:
        """Any text in which, once `begin` is written, calls follow."""
        if self.section_end is None:
            tags = [self._call(tool) for tool in tools]
        else:
            tags = [self.calls(tools, one_only)]
        return {"type": "triggered_tags", "triggers": [self.begin], "tags": tags, "stop_after_first": one_only}

    def _call(self, tool: FunctionTool) -> Format:
        begin = self.call_begin.replace("NAME", tool.name)
        schema = dict(tool.parameters) if tool.strict else {"type": "object"}
        return tag_format(begin, json_schema_format(schema), self.call_close)


_HERMES = ToolCallFormat(
    begin="<tool_call>",
    header=regex.compile(r'\s*\{\s*"name"\s*:\s*"(?P<name>[^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'),
    call_begin='<tool_call>\n{"name": "NAME", "arguments": ',
    call_close="}\n</tool_call>",
    call_end="</tool_call>",
    section_end=None,
)


def _marker(words: str) -> str:
    """One of DeepSeek's: words between special bars, joined by special blanks."""
    blank, bar = "\N{LOWER ONE EIGHTH BLOCK}", "\N{FULLWIDTH VERTICAL LINE}"
    return f"<{bar}{words.replace(' ', blank)}{bar}>"


_CALLS_BEGIN, _CALLS_END = _marker("tool calls begin"), _marker("tool calls end")
_CALL_BEGIN, _CALL_END, _SEPARATOR = _marker("tool call begin"), _marker("tool call end"), _marker("tool sep")
_DEEPSEEK_V3 = ToolCallFormat(
    begin=_CALLS_BEGIN,
    header=regex.compile(rf"\s*{_CALL_BEGIN}function{_SEPARATOR}(?P<name>[^\n<]+)\n```json\n\s*(?=\{{)"),
    call_begin=f"{_CALL_BEGIN}function{_SEPARATOR}NAME\n```json\n",
    call_close=f"\n```{_CALL_END}",
    call_end=_CALL_END,
    section_end=_CALLS_END,
)
_DEEPSEEK_V31 = ToolCallFormat(
    begin=_CALLS_BEGIN,
    header=regex.compile(rf"\s*{_CALL_BEGIN}(?P<name>[^<]+){_SEPARATOR}\s*(?=\{{)"),
    call_begin=f"{_CALL_BEGIN}NAME{_SEPARATOR}",
    call_close=_CALL_END,
    call_end=_CALL_END,
    section_end=_CALLS_END,
)
TOOL_CALL_FORMATS = {
    "qwen25": _HERMES,
    "qwen": _HERMES,
    "hermes": _HERMES,
    "deepseekv3": _DEEPSEEK_V3,
    "deepseekv31": _DEEPSEEK_V31,
}
"""By the names that --tool-call-parser takes."""
