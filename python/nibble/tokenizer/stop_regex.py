"""Regular expressions that end a text."""

from collections.abc import Sequence

import regex

from nibble.utils.errors import RequestError

TIMEOUT_S = 0.05
"""For one look at the newest character of a text; a sound expression takes microseconds."""


def compile_stop_regex(pattern: str) -> regex.Pattern[str]:
    """Raises RequestError for what is no regular expression, or matches where there is no text."""
    try:
        compiled = regex.compile(pattern)
        matches_nothing = compiled.search("", timeout=TIMEOUT_S) is not None
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise RequestError(
            f"stop_regex holds {pattern[:80]!r}, which is no regular expression: {error}", "stop_regex"
        ) from None
    except TimeoutError:
        raise _too_slow(pattern) from None
    if matches_nothing:
        raise RequestError(
            f"stop_regex holds {pattern[:80]!r}, which matches the empty text and would end every answer at once",
            "stop_regex",
        )
    return compiled


class StopRegexMatcher:
    """Looks for the expressions in a text that arrives in pieces, after each of its characters.

    The match that is complete first ends the text, whichever way it is cut; of several that are complete with the same
    character the one that began first.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = {pattern: compile_stop_regex(pattern) for pattern in patterns}
        self._text = ""
        self._begin = dict.fromkeys(patterns, 0)
        """Before this place no match can begin any more."""
        self._shown = 0

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that is certainly outside every match, and the expression that matched.

        Raises RequestError when looking for it takes too long.
        """
        seen = len(self._text)
        self._text += text
        for end in range(seen + 1, len(self._text) + 1):
            found = [(place, pattern) for pattern in self._patterns if (place := self._match(pattern, end)) is not None]
            if found:
                place, pattern = min(found)
                return self._show(place), pattern
        return self._show(min(self._begin.values())), None

    def flush(self) -> str:
        return self._show(len(self._text))

    def _match(self, pattern: str, end: int) -> int | None:
        """Where a match begins that is complete at `end`."""
        try:
            match = self._patterns[pattern].search(
                self._text, pos=self._begin[pattern], endpos=end, partial=True, timeout=TIMEOUT_S
            )
        except TimeoutError:
            raise _too_slow(pattern) from None
        self._begin[pattern] = end if match is None else match.start()
        return None if match is None or match.partial else match.start()

    def _show(self, end: int) -> str:
        shown, self._shown = self._text[self._shown : end], max(end, self._shown)
        return shown


def _too_slow(pattern: str) -> RequestError:
    return RequestError(f"stop_regex {pattern[:80]!r} takes too long to look for; simplify it", "stop_regex")
