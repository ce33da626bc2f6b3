"""Texts end before the first match of a stop regex, and never show a beginning of one."""

import collections
import re
import time
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from fake_engine import COMPLETIONS, REPLY, Api
from nibble.tokenizer.detokenizer import IncrementalDetokenizer
from nibble.tokenizer.stop_regex import MAX_SIZE, SEARCH_BUDGET_S, StopRegexMatcher, compile_stop_regexes
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
    compile_stop_regexes((CATASTROPHE,))
    matcher = StopRegexMatcher([CATASTROPHE])
    with pytest.raises(RequestError, match="takes too long"):
        matcher.push("x" * 5000)


def test_many_slow_regexes_share_one_budget():
    """64 that took a little less than what each was allowed held up everybody for as often as much."""
    matcher = StopRegexMatcher([f"[a-f ]*[b-e ]*{'x' * count}Q" for count in range(1, 64)])
    longest = 0.0

    def push() -> None:
        nonlocal longest
        started = time.thread_time()
        try:
            matcher.push("abcdef ")
        finally:
            longest = max(longest, time.thread_time() - started)

    with pytest.raises(RequestError, match="takes too long"):
        collections.deque((push() for _ in range(20_000)), maxlen=0)
    assert longest < 5 * SEARCH_BUDGET_S


def test_sound_regexes_do_not_use_up_their_budget_over_a_long_answer():
    matcher = StopRegexMatcher([r"\n\n+#", "END[0-9]{3}", r"(?i)observation\s*:"])
    for _ in range(5000):
        assert matcher.push("some text, ")[1] is None


BOMBS = [
    "(?:(?:(?:a{60}){60}){60}){60}",
    "(?:((?:[ab]{30,}){30,40}c)?){30}",
    "(?:a{60}(?#why not)){60}{60}",
    "(?V1)(?:[[)]{60}b]{60}){60}",
    f"a{{{'9' * 1000}}}",
    ["[ab]{60}" * 20] * 60,
]


@pytest.mark.parametrize("patterns", BOMBS, ids=range(len(BOMBS)))
def test_a_regex_that_would_be_huge_when_compiled_is_refused_before_it_is(patterns, monkeypatch):
    """One of them froze the server for 23 s and took 5.7 GB."""
    monkeypatch.setattr("regex.compile", lambda *_, **__: pytest.fail("it is compiled"))
    error = Api().error(COMPLETIONS, {"prompt": "Hi", "stop_regex": patterns})
    assert error["param"] == "stop_regex" and f"{MAX_SIZE} characters together" in error["message"]


def test_repeats_that_could_hide_in_verbose_mode_are_refused_with_it():
    error = Api().error(COMPLETIONS, {"prompt": "Hi", "stop_regex": "(?ix)(?:a{6 0}#\n){60}"})
    assert error["param"] == "stop_regex" and "flag x" in error["message"]


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "01234567-89ab-cdef-0123-456789abcdef"),
        (r"(?:[0-9]{1,3}\.){3}[0-9]{1,3}", "127.0.0.1"),
        (r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}(?::[0-9]{2}){0,1}Z", "2026-01-02T03:04Z"),
        ('{"a{2}x{3,4', '{"aax{3,4'),
        ("(?:-{3}|={3}){10}", "---===" * 5),
    ],
)
def test_repeats_that_people_write_are_taken(pattern, text):
    assert StopRegexMatcher([pattern]).push(f"see {text}")[1] == pattern


def test_a_requests_regexes_are_compiled_once_for_all_its_choices(monkeypatch):
    compiled = []
    compile_one = regex.compile

    def counting(pattern, **options):
        compiled.append(pattern)
        return compile_one(pattern, **options)

    monkeypatch.setattr("regex.compile", counting)
    Api().result(COMPLETIONS, {"prompt": ["Hi", "Ho"], "n": 3, "stop_regex": ["compiled once", "and so is this"]})
    assert compiled == ["compiled once", "and so is this"]


def test_prompts_of_one_request_can_not_have_each_a_regex_of_its_own_to_compile():
    """A thousand large ones would be compiled one after the other, and nobody else served meanwhile."""
    params = [{"stop_regex": f"end {index}"} for index in range(17)]
    error = Api().error("/generate", {"text": ["Hi"] * 17, "sampling_params": params})
    assert error["param"] == "sampling_params.stop_regex" and "at most 16" in error["message"]
    assert len(Api().result("/generate", {"text": ["Hi"] * 16, "sampling_params": params[:16]})) == 16
