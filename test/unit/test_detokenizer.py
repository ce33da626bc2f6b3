"""Incremental detokenization shows what decoding everything at once shows, and stops where the stop string begins."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nibble.tokenizer.detokenizer import IncrementalDetokenizer
from tiny_tokenizer import tiny_sentencepiece_tokenizer, tiny_tokenizer

BYTE_LEVEL = tiny_tokenizer()
SENTENCEPIECE = tiny_sentencepiece_tokenizer()
NUM_BYTES = 256
TEXTS = st.text(alphabet=st.sampled_from("ab lo.\n你界é😀👩‍👩‍👧🇪🇺"), max_size=30)


def byte_tokens(text: str | bytes) -> list[int]:
    """One token of the byte-level vocabulary for every byte."""
    content = text.encode() if isinstance(text, str) else text
    by_byte = {BYTE_LEVEL.token_bytes(token): token for token in range(NUM_BYTES)}
    return [by_byte[bytes([byte])] for byte in content]


def increments(detokenizer: IncrementalDetokenizer, batches: list[list[int]]) -> list[str]:
    shown = [""]
    for batch in batches:
        detokenizer.append(batch)
        assert detokenizer.text.startswith(shown[-1]), "text that was shown must never be taken back"
        shown.append(detokenizer.text)
    detokenizer.finish()
    assert detokenizer.text.startswith(shown[-1])
    return [*shown, detokenizer.text]


def cut(tokens: list[int], boundaries: list[int]) -> list[list[int]]:
    edges = [0, *sorted(boundary for boundary in boundaries if boundary < len(tokens)), len(tokens)]
    return [tokens[start:end] for start, end in itertools.pairwise(edges)]


@given(
    tokens=st.lists(st.integers(0, BYTE_LEVEL.vocab_size + 5), max_size=60),
    boundaries=st.lists(st.integers(0, 60), max_size=10),
    skip_special_tokens=st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_increments_add_up_to_the_full_decode(tokens, boundaries, skip_special_tokens):
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, skip_special_tokens=skip_special_tokens)
    shown = increments(detokenizer, cut(tokens, boundaries))
    assert shown[-1] == BYTE_LEVEL.decode(tokens, skip_special_tokens=skip_special_tokens)
    assert detokenizer.num_tokens == len(tokens)


@given(content=st.binary(max_size=60) | st.lists(st.sampled_from([0x80, 0xE2, 0x82, 0xF0, 0x9F, 0x41])).map(bytes))
@settings(max_examples=400, deadline=None)
def test_bytes_that_are_not_utf8_add_up_to_the_full_decode(content):
    tokens = byte_tokens(content)
    shown = increments(IncrementalDetokenizer(BYTE_LEVEL), [[token] for token in tokens])
    assert shown[-1] == content.decode(errors="replace") == BYTE_LEVEL.decode(tokens)


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_a_sentencepiece_vocabulary_keeps_its_spaces_and_byte_tokens(text):
    tokens = SENTENCEPIECE.encode(text)
    shown = increments(IncrementalDetokenizer(SENTENCEPIECE), [[token] for token in tokens])
    assert shown[-1] == SENTENCEPIECE.decode(tokens)
    assert shown[-1] == text or text.startswith(" "), "only the space at the very start may be lost"


def test_tokens_without_text_do_not_swallow_the_space_after_them():
    before = SENTENCEPIECE.encode("a")
    after = SENTENCEPIECE.encode("a b")[len(before) :]
    tokens = [*before, *[SENTENCEPIECE.vocab_size] * 3, *after]
    shown = increments(IncrementalDetokenizer(SENTENCEPIECE), [[token] for token in tokens])
    assert shown[-1] == SENTENCEPIECE.decode(tokens) == "a b"


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_no_half_character_is_ever_shown(text):
    shown = increments(IncrementalDetokenizer(BYTE_LEVEL), [[token] for token in byte_tokens(text)])
    assert all(text.startswith(piece) for piece in shown)
    assert shown[-1] == text


def test_each_character_is_shown_with_its_last_token():
    shown = increments(IncrementalDetokenizer(BYTE_LEVEL), [[token] for token in byte_tokens("é世😀")])
    assert shown == ["", "", "é", "é", "é", "é世", "é世", "é世", "é世", "é世😀", "é世😀"]


def test_an_unfinished_character_is_shown_as_a_replacement_at_the_end():
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL)
    detokenizer.append(byte_tokens("ok😀"[:2]) + byte_tokens("😀")[:2])
    assert detokenizer.text == "ok"
    detokenizer.finish()
    assert detokenizer.text == "ok\N{REPLACEMENT CHARACTER}"


def test_text_is_decoded_in_windows_of_bounded_length():
    """Even when nothing but invalid bytes arrives, or the text is one endless run of replacement characters."""

    class CountingDecoder:
        special_token_ids = BYTE_LEVEL.special_token_ids
        vocab_size = BYTE_LEVEL.vocab_size
        longest = 0

        def decode(self, token_ids, skip_special_tokens=True):
            self.longest = max(self.longest, len(token_ids))
            return BYTE_LEVEL.decode(token_ids, skip_special_tokens)

    for content in (b"\xff" * 200, b"\xf0\x9f\x98" * 100, b"plain text " * 20, "😀".encode() * 50):
        decoder = CountingDecoder()
        detokenizer = IncrementalDetokenizer(decoder)
        detokenizer.append(byte_tokens(content))
        assert decoder.longest <= 9


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Grows the text by one character at a time until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(
    text=st.text(alphabet="ab😀", max_size=25) | st.text(alphabet="ab", max_size=25),
    stops=st.lists(st.text(alphabet="aab😀", min_size=1, max_size=5), min_size=1, max_size=4),
    boundaries=st.lists(st.integers(0, 60), max_size=12),
)
@example(text="aaab", stops=["aab"], boundaries=[])
@example(text="ababac", stops=["abac", "x"], boundaries=[1, 3])
@settings(max_examples=500, deadline=None)
def test_the_stop_string_completed_first_ends_the_text_however_it_is_cut(text, stops, boundaries):
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, stops)
    tokens = byte_tokens(text)
    shown = increments(detokenizer, cut(tokens, boundaries))
    expected, stop = reference_stop(text, stops)
    assert (shown[-1], detokenizer.matched_stop) == (expected, stop)
    assert all(expected.startswith(piece) for piece in shown), "nothing of a stop string may be shown"
    needed = len(tokens) if stop is None else len(byte_tokens(expected + stop))
    assert detokenizer.num_tokens == needed


@pytest.mark.parametrize("split", range(1, len("before STOP✋ after".encode())))
def test_a_stop_string_is_found_across_every_token_boundary(split):
    text = "before STOP✋ after"
    tokens = byte_tokens(text)
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ("STOP✋",))
    shown = increments(detokenizer, [tokens[:split], tokens[split:]])
    assert shown[-1] == "before "
    assert detokenizer.num_tokens == len("before STOP✋".encode())


def test_the_earliest_of_several_stop_strings_wins():
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ("world", "llo", "dog"))
    assert detokenizer.append(BYTE_LEVEL.encode("Hello, world")) == "llo"
    assert detokenizer.text == "He"


def test_text_held_back_for_a_stop_string_is_shown_when_it_goes_another_way_or_ends():
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ("</div>",))
    detokenizer.append(byte_tokens("a</di"))
    assert detokenizer.text == "a"
    detokenizer.append(byte_tokens("m</d"))
    assert detokenizer.text == "a</dim"
    assert detokenizer.finish() is None
    assert detokenizer.text == "a</dim</d"


def test_a_stop_string_may_be_a_special_token_that_is_shown():
    tokens = BYTE_LEVEL.encode("done<|im_start|>more")
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ("<|im_start|>",), skip_special_tokens=False)
    assert detokenizer.append(tokens) == "<|im_start|>"
    assert detokenizer.text == "done"


def test_tokens_after_a_stop_string_are_ignored():
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, (".",))
    detokenizer.append(byte_tokens("one. two"))
    detokenizer.append(byte_tokens(" three"))
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.num_tokens) == ("one", 4)


def test_a_stop_string_completed_by_the_flush_of_an_unfinished_character_counts():
    detokenizer = IncrementalDetokenizer(BYTE_LEVEL, ("x\N{REPLACEMENT CHARACTER}",))
    detokenizer.append(byte_tokens(b"abx\xe2"))
    assert detokenizer.finish() == "x\N{REPLACEMENT CHARACTER}"
    assert detokenizer.text == "ab"
