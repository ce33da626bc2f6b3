"""Regular expressions that end a text."""

import time
from collections.abc import Sequence
from functools import lru_cache

import regex

from nibble.utils.errors import RequestError

MAX_SIZE = 4096
"""Characters of a request's expressions, repeats written out. Compiling them takes about 20 ms and 2 MB at most."""
MAX_DIFFERENT = 16
"""Ways in which the prompts of one HTTP request may set stop_regex; as many are kept compiled."""
SEARCH_BUDGET_S = 0.1
"""CPU time that the searches of one request may take at once."""
REFILL_S = 10e-6
"""What comes back to the budget with each search: several times what one for a sound expression takes."""

_REPEAT = regex.compile(r"\{(\d+)(?:,\d*)?\}")
_VERBOSE = regex.compile(r"\(\?[\w-]*x")


@lru_cache(maxsize=MAX_DIFFERENT)  # the check of a request and all its choices share what is compiled
def compile_stop_regexes(patterns: tuple[str, ...]) -> dict[str, regex.Pattern[str]]:
    """By expression. Raises RequestError for those that are no regular expressions, match where there is no text or
    are larger than MAX_SIZE together."""
    if sum(map(_expanded_size, patterns)) > MAX_SIZE:
        largest = max(patterns, key=_expanded_size)
        raise RequestError(
            f"stop_regex is too large: its expressions may have {MAX_SIZE} characters together, the repeats {{m,n}}"
            f" written out m times; simplify {largest[:80]!r}",
            "stop_regex",
        )
    budget = _SearchBudget()
    return {pattern: _compile(pattern, budget) for pattern in patterns}


class _SearchBudget:
    """CPU time, of which other threads and processes take none away."""

    def __init__(self) -> None:
        self._left = SEARCH_BUDGET_S

    def search(
        self, compiled: regex.Pattern[str], text: str, begin: int, end: int, partial: bool
    ) -> "regex.Match[str] | None":
        """Raises RequestError when the budget is spent."""
        started = time.thread_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            return compiled.search(text, pos=begin, endpos=end, partial=partial, timeout=self._left)
        except TimeoutError:
            shown = compiled.pattern[:80]
            raise RequestError(f"stop_regex {shown!r} takes too long to look for; simplify it", "stop_regex") from None
        finally:
            self._left = min(self._left + REFILL_S - (time.thread_time() - started), SEARCH_BUDGET_S)


def _expanded_size(pattern: str) -> int:
    """No less than what the compiler makes of a pattern: it writes m copies of what must come m times.

    A count after a group, or after another count, may stand around any of the others, so it multiplies them all; one
    after a character or a set stands for itself. Raises RequestError in verbose mode, where that can't be seen.
    """
    if _VERBOSE.search(pattern):
        raise RequestError(
            f"stop_regex holds {pattern[:80]!r}; its flag x is not supported, write it out", "stop_regex"
        )
    size, factor = len(pattern), 1
    for repeat in _REPEAT.finditer(pattern):
        count = int(repeat[1])
        if pattern[: repeat.start()].endswith((")", "}", "?", "*", "+")):
            factor *= max(count, 1)
        else:
            size += count
    return size * factor


def _compile(pattern: str, budget: _SearchBudget) -> regex.Pattern[str]:
    try:
        compiled = regex.compile(pattern, cache_pattern=False)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise RequestError(
            f"stop_regex holds {pattern[:80]!r}, which is no regular expression: {error}", "stop_regex"
        ) from None
    if budget.search(compiled, "", 0, 0, partial=False) is not None:
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
        self._patterns = compile_stop_regexes(tuple(patterns))
        self._budget = _SearchBudget()
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
        match = self._budget.search(self._patterns[pattern], self._text, self._begin[pattern], end, partial=True)
        self._begin[pattern] = end if match is None else match.start()
        return None if match is None or match.partial else match.start()

    def _show(self, end: int) -> str:
        shown, self._shown = self._text[self._shown : end], max(end, self._shown)
        return shown
