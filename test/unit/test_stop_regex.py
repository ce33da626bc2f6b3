"""Texts end before the first match of a stop regex, and never show a beginning of one."""

import re
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_engine import COMPLETIONS, REPLY, Api
from nibble.tokenizer.detokenizer import IncrementalDetokenizer
from nibble.tokenizer.stop_regex import StopRegexMatcher, compile_stop_regex
from nibble.utils.errors import RequestError
from tiny_tokenizer import tiny_tokenizer

CATASTROPHE = "(x+x+)+y"


def first_match(patterns: list[str], text: str) -> tuple[str, str | None]:
    """The definition: the shortest beginning of the text in which anything is found."""
    for end in range(len(text) + 1):
        found = [(match.start(), pattern) for pattern in patterns if (match := re.search(pattern, text[:end]))]
        if found:
            place, pattern = min(found)
            return text[:place], pattern
    return text, None


PATTERNS = ["ab+c", "a.c", "[0-9]{2}", "b|ca", "(?<=a)b", "cc+", "a(b|c)*d"]


@given(
    patterns=st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True),
    text=st.text(st.sampled_from("abcd01"), max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_a_text_ends_before_the_match_that_is_complete_first_however_it_is_cut(patterns, text, cuts):
    matcher = StopRegexMatcher(patterns)
    shown, matched = "", None
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for begin, end in pairwise(places):
        new, matched = matcher.push(text[begin:end])
        shown += new
        assert first_match(patterns, text)[0].startswith(shown), "what is shown is never taken back"
        if matched is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, matched) == first_match(patterns, text)


def test_stop_strings_and_regexes_watch_together():
    tokenizer = tiny_tokenizer()

    def ended(stop: list[str], stop_regex: list[str]) -> tuple[str, str | None]:
        detokenizer = IncrementalDetokenizer(tokenizer, stop, True, stop_regex)
        detokenizer.append(tokenizer.encode("one 12 two 345 three"))
        detokenizer.finish()
        return detokenizer.text, detokenizer.matched_stop

    assert ended(["three"], ["[0-9]{3}"]) == ("one 12 two ", "[0-9]{3}")
    assert ended(["two"], ["[0-9]{3}"]) == ("one 12 ", "two")
    assert ended(["wo 3"], ["12 two x"]) == ("one 12 t", "wo 3"), "what a regex held back belongs to the text"
    assert ended([], ["12 two x"]) == ("one 12 two 345 three", None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_ended_by_its_regex(stream):
    body = {"prompt": "Hi", "stop_regex": ["[0-9]{3}", "never"], "max_tokens": 100}
    api = Api()
    if stream:
        choices = [event["choices"][0] for event in api.events(COMPLETIONS, body)]
    else:
        choices = api.result(COMPLETIONS, body)["choices"]
    assert "".join(choice["text"] for choice in choices) == REPLY[: REPLY.index("1234")]
    assert (choices[-1]["finish_reason"], choices[-1]["matched_stop"]) == ("stop", "[0-9]{3}")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("(a", "no regular expression"),
        ("a*", "matches the empty text"),
        (["a"] * 65, "at most 64"),
        ("a" * 1025, "1024"),
    ],
)
def test_what_can_end_no_text_is_refused(patterns, message):
    error = Api().error(COMPLETIONS, {"prompt": "Hi", "stop_regex": patterns})
    assert error["param"] == "stop_regex" and message in error["message"]


def test_a_regex_that_takes_too_long_fails_its_request():
    assert isinstance(compile_stop_regex(CATASTROPHE), regex.Pattern)
    matcher = StopRegexMatcher([CATASTROPHE])
    with pytest.raises(RequestError, match="takes too long"):
        matcher.push("x" * 5000)
