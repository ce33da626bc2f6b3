"""Function calls in the text of a model, found while it arrives."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from nibble.entrypoints.text_markers import split_at_marker
from nibble.entrypoints.tools.formats import ToolCallFormat


@dataclass(frozen=True)
class CallDelta:
    """News of the call `index`: the `name` comes first, with no arguments yet, which follow as pieces of JSON."""

    index: int
    name: str | None
    arguments: str


@dataclass
class ToolDelta:
    """What a piece of text adds to the answer."""

    text: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolCallParser:
    """Splits a text into what is said and what is called.

    What looks like a call but is none of a known function, or is no JSON, stays text. White space around calls is
    dropped. However the text is cut into pieces, the same comes out in all.
    """

    def __init__(self, call_format: ToolCallFormat, names: Collection[str]) -> None:
        self.num_calls = 0
        self._format = call_format
        self._names = names
        self._rest = ""
        """What has been taken in and not been understood yet."""
        self._undo = ""
        """What turns back into text if no call follows: the marker that began the calls."""
        self._space = ""
        """White space that belongs to the text if more text follows."""
        self._follows_call = False
        self._arguments = JsonObjectEnd()
        self._read: Callable[[ToolDelta], bool] = self._read_text

    def push(self, text: str) -> ToolDelta:
        self._rest += text
        delta = ToolDelta()
        while self._read(delta):
            pass
        return delta

    def finish(self) -> ToolDelta:
        """What is left when the text has ended."""
        delta = ToolDelta()
        if self._read in (self._read_text, self._read_header):
            self._say(self._undo + self._rest, delta)
            if not self.num_calls:
                delta.text += self._space
        return delta

    # Each reads on from the beginning of the rest; false when it needs more text than there is.

    def _read_text(self, delta: ToolDelta) -> bool:
        text, marker, self._rest = split_at_marker(self._rest, [self._format.begin])
        self._say(text, delta)
        if marker is None:
            return False
        self._undo, self._read = marker, self._read_header
        return True

    def _read_header(self, delta: ToolDelta) -> bool:
        end = self._format.section_end
        if end is not None and not self._undo:
            rest = self._rest.lstrip()
            if rest.startswith(end):
                self._rest, self._read = rest.removeprefix(end), self._read_text
                return True
            if end.startswith(rest):
                return False
        header = self._format.header.match(self._rest, partial=True)
        if header is not None and header.partial:
            return False
        if header is None or header["name"] not in self._names:
            self._say(self._undo, delta)
            self._undo, self._read = "", self._read_text
            return True
        delta.calls.append(CallDelta(self.num_calls, header["name"], ""))
        self._rest, self._undo = self._rest[header.end() :], ""
        self._arguments, self._read = JsonObjectEnd(), self._read_arguments
        self.num_calls += 1
        return True

    def _read_arguments(self, delta: ToolDelta) -> bool:
        end = self._arguments.find(self._rest)
        arguments = self._rest[:end]
        if arguments:
            delta.calls.append(CallDelta(self.num_calls - 1, None, arguments))
        self._rest = self._rest[len(arguments) :]
        if end is None:
            return False
        self._read = self._read_call_end
        return True

    def _read_call_end(self, delta: ToolDelta) -> bool:
        _, marker, self._rest = split_at_marker(self._rest, [self._format.call_end])
        if marker is None:
            return False
        self._space, self._follows_call = "", True
        self._read = self._read_text if self._format.section_end is None else self._read_header
        return True

    def _say(self, text: str, delta: ToolDelta) -> None:
        text = self._space + text
        if self._follows_call:
            text = text.lstrip()
        spoken = text.rstrip()
        self._follows_call = self._follows_call and not spoken
        delta.text += spoken
        self._space = text[len(spoken) :]


class JsonObjectEnd:
    """Where a JSON object ends whose text arrives in pieces, the first of which begins with its brace."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The place behind the closing brace in this piece, None if it is not there."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif character == "\\" and self._in_string:
                self._escaped = True
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string and character in "{[":
                self._depth += 1
            elif not self._in_string and character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        return None
