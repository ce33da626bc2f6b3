"""What a chat answer consists of: thoughts, text and function calls."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nibble.entrypoints.openai_protocol import ChatCompletionRequest, Tool
from nibble.entrypoints.reasoning import ReasoningFormat, ReasoningParser, Start, after_thoughts
from nibble.entrypoints.tools.formats import FunctionTool, ToolCallFormat
from nibble.entrypoints.tools.parser import CallDelta, ToolCallParser
from nibble.structured_output.grammar import Format, Grammar, make_grammar
from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import RequestError


@dataclass(frozen=True)
class ChatFormats:
    """How the model writes what is not text. None: it is not looked for."""

    tools: ToolCallFormat | None = None
    reasoning: ReasoningFormat | None = None


@dataclass
class AnswerDelta:
    """What one more piece of text adds."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ChatAnswerParser:
    """Takes the text of one choice apart, piece by piece."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolCallParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def has_calls(self) -> bool:
        return self._tools is not None and self._tools.num_calls > 0

    def push(self, text: str, is_last: bool) -> AnswerDelta:
        thoughts = ""
        if self._reasoning is not None:
            thoughts, text = self._reasoning.push(text)
            if is_last:
                last_thoughts, last_text = self._reasoning.finish()
                thoughts, text = thoughts + last_thoughts, text + last_text
        delta = AnswerDelta(thoughts, text)
        if self._tools is not None:
            found = [self._tools.push(text), *([self._tools.finish()] if is_last else [])]
            delta.content = "".join(piece.text for piece in found)
            delta.calls = [call for piece in found for call in piece.calls]
        return delta


class ChatAnswerFormat:
    """What one request's answers look like. Raises RequestError where the server lacks what it asks for."""

    def __init__(self, body: ChatCompletionRequest, formats: ChatFormats) -> None:
        if body.usable_tools and formats.tools is None:
            raise RequestError("tools need a server that was started with --tool-call-parser", "tools")
        if formats.reasoning is None and body.separate_reasoning and "separate_reasoning" in body.model_fields_set:
            message = "separate_reasoning needs a server that was started with --reasoning-parser"
            raise RequestError(message, "separate_reasoning")
        self._body = body
        self._tools = formats.tools if body.usable_tools else None
        self._reasoning = formats.reasoning

    def needs_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether tokens that usually are left out of the text tell the calls apart from it."""
        if self._tools is None:
            return False
        tokens = tokenizer.encode(self._tools.begin + self._tools.call_begin, add_special_tokens=False)
        return not tokenizer.special_token_ids.isdisjoint(tokens)

    def start(self, prompt_end: str) -> Start:
        """How the answer to a prompt that ends so begins."""
        return "answering" if self._reasoning is None else self._reasoning.start(prompt_end)

    def parser(self, start: Start) -> ChatAnswerParser:
        separates = self._reasoning is not None and self._body.separate_reasoning
        names = {tool.function.name for tool in self._body.usable_tools}
        return ChatAnswerParser(
            ReasoningParser(start) if separates else None,
            None if self._tools is None else ToolCallParser(self._tools, names),
        )

    def grammar(self, start: Start) -> Grammar | None:
        """What the whole answer is held to, thoughts aside."""
        wanted = self._body.answer_formats()
        field, content = next(iter(wanted.items()), ("", None))
        if self._tools is not None:
            field, content = self._with_calls(self._tools, field, content)
        return None if content is None else make_grammar(after_thoughts(content, start), field)

    def _with_calls(self, tools: ToolCallFormat, field: str, content: Format | None) -> tuple[str, Format | None]:
        body, one_only = self._body, not self._body.parallel_tool_calls
        forced = body.forced_tools
        if forced is not None:
            return "tool_choice", tools.calls(_functions(forced, strict=True), one_only)
        if content is not None:
            calls = tools.calls(_functions(body.tools), one_only)
            return field, {"type": "or", "elements": [content, calls]}
        if one_only or any(tool.function.strict for tool in body.tools):
            field = "parallel_tool_calls" if one_only else "tools"
            return field, tools.text_with_calls(_functions(body.tools), one_only)
        return field, None


def _functions(tools: Sequence[Tool], strict: bool = False) -> list[FunctionTool]:
    return [
        FunctionTool(tool.function.name, tool.function.parameters, strict or tool.function.strict) for tool in tools
    ]


def tool_call_fields(call: CallDelta) -> dict[str, Any]:
    """A call in the deltas of a stream: its id and name once, then its arguments."""
    fields: dict[str, Any] = {"index": call.index, "function": {"arguments": call.arguments}}
    if call.name is not None:
        fields |= {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function"}
        fields["function"] = {"name": call.name, "arguments": call.arguments}
    return fields


def merged_tool_calls(calls: list[CallDelta]) -> list[dict[str, Any]]:
    """All calls of an answer, as a message has them."""
    merged: list[dict[str, Any]] = []
    for call in calls:
        if call.name is not None:
            merged.append(tool_call_fields(call))
            del merged[-1]["index"]
        else:
            merged[-1]["function"]["arguments"] += call.arguments
    return merged
