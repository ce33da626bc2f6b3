"""What a model thinks before it answers, told apart from the answer."""

from dataclasses import dataclass
from typing import Literal

from nibble.entrypoints.text_markers import split_at_marker
from nibble.structured_output.grammar import Format, optional_format, sequence_format, tag_format, text_format

BEGIN, END = "<think>", "</think>"

Start = Literal["thinking", "answering", "either"]
"""How an answer begins: the thoughts' first marker may have been in the prompt, or the whole of them."""


@dataclass(frozen=True)
class ReasoningFormat:
    """Thoughts between the markers. Models that `always` think may leave out the first marker."""

    always: bool

    def start(self, prompt_end: str) -> Start:
        """How the answer to a prompt begins that ends so."""
        ending = prompt_end.rstrip()
        if ending.endswith(END):
            return "answering"
        return "thinking" if self.always or ending.endswith(BEGIN) else "either"


REASONING_FORMATS = {
    "deepseek-r1": ReasoningFormat(always=True),
    "deepseek-v3": ReasoningFormat(always=False),
    "qwen3": ReasoningFormat(always=False),
    "qwen3-thinking": ReasoningFormat(always=True),
}
"""By the names that --reasoning-parser takes."""


def after_thoughts(answer: Format, start: Start) -> Format:
    """The format of a text whose answer, behind the thoughts, has this one."""
    if start == "answering":
        return answer
    ends = [f"{END}\n\n", END]
    if start == "thinking":
        return sequence_format([tag_format("", text_format(), ends), answer])
    return sequence_format([optional_format(tag_format(BEGIN, text_format(), ends)), answer])


class ReasoningParser:
    """Splits a text that arrives in pieces. White space around the thoughts is dropped."""

    def __init__(self, start: Start) -> None:
        self._state: Literal["begin", "thinking", "answering"] = "answering" if start == "answering" else "begin"
        self._thinks_anyway = start == "thinking"
        self._rest = ""
        self._space = ""
        """White space that belongs to the thoughts if more of them follow."""
        self._is_first = False
        """Whether white space that comes now is between thoughts and what they belong to."""

    def push(self, text: str) -> tuple[str, str]:
        """More thoughts and more of the answer."""
        self._rest += text
        thoughts = ""
        if self._state == "begin":
            self._begin()
        if self._state == "thinking":
            text, marker, self._rest = split_at_marker(self._rest, [END])
            thoughts = self._think(text)
            if marker is not None:
                self._state, self._is_first = "answering", True
        return thoughts, self._answer() if self._state == "answering" else ""

    def finish(self) -> tuple[str, str]:
        """What is left when the text has ended."""
        rest, self._rest = self._rest, ""
        if self._state == "thinking" or (self._state == "begin" and self._thinks_anyway):
            return self._think(rest), ""
        return "", rest

    def _begin(self) -> None:
        text = self._rest.lstrip()
        if text.startswith(BEGIN):
            self._state, self._rest, self._is_first = "thinking", text.removeprefix(BEGIN), True
        elif not BEGIN.startswith(text):
            self._state = "thinking" if self._thinks_anyway else "answering"
            self._is_first = self._thinks_anyway

    def _think(self, text: str) -> str:
        text = self._space + text
        if self._is_first:
            text = text.lstrip()
            self._is_first = not text
        thoughts = text.rstrip()
        self._space = text[len(thoughts) :]
        return thoughts

    def _answer(self) -> str:
        text, self._rest = self._rest, ""
        if self._is_first:
            text = text.lstrip()
            self._is_first = not text
        return text
