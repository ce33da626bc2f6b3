"""Token ids to text as they arrive, and stop strings, in constant time per token."""

from collections.abc import Sequence
from typing import Protocol

from nibble.tokenizer.stop_regex import StopRegexMatcher

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character; every token stands for one byte or more."""


class Decoder(Protocol):
    """What detokenization needs of a tokenizer."""

    special_token_ids: frozenset[int]
    vocab_size: int

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class IncrementalDetokenizer:
    """The text of one generation.

    `text` only ever grows: it never holds half a character, nor a beginning of a stop string that may still be
    completed. Once a stop string has matched, the text ends before it and further tokens are ignored.

    Among several stop strings the one that is completed first wins, whichever way the text is cut into tokens; of
    those completed by the same character, the longest. Stop regexes see what the stop strings let pass.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        stop_regex: Sequence[str] = (),
    ) -> None:
        self.matched_stop: str | None = None
        self.num_tokens = 0
        """Tokens consumed; after a match, up to and including the one that completed the stop string."""
        self._characters = _CharacterStream(tokenizer, skip_special_tokens)
        self._stops = _StopMatcher(stop) if stop else None
        self._regexes = StopRegexMatcher(stop_regex) if stop_regex else None
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything decoded so far that is safe to show."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, token_ids: Sequence[int]) -> str | None:
        """Decodes the next tokens; returns the stop string that ended the text, or None while it goes on."""
        for token_id in token_ids:
            if self.matched_stop is not None:
                break
            self.num_tokens += 1
            self._release(self._characters.push(token_id))
        return self.matched_stop

    def finish(self) -> str | None:
        """Shows what was held back, when no token follows; returns the stop string that ended the text, if any."""
        if self.matched_stop is None:
            self._release(self._characters.flush())
        if self.matched_stop is None and self._stops is not None:
            self._show(self._stops.flush())
        if self.matched_stop is None and self._regexes is not None:
            self._pieces.append(self._regexes.flush())
        return self.matched_stop

    def _release(self, new_text: str) -> None:
        stop = None
        if self._stops is not None:
            new_text, stop = self._stops.push(new_text)
        self._show(new_text)
        if stop is not None and self.matched_stop is None:
            self.matched_stop = stop
            if self._regexes is not None:
                self._pieces.append(self._regexes.flush())

    def _show(self, new_text: str) -> None:
        if self._regexes is not None:
            new_text, self.matched_stop = self._regexes.push(new_text)
        if new_text:
            self._pieces.append(new_text)


class _CharacterStream:
    """Token ids in, whole characters out; in all, exactly what decoding the whole sequence at once gives.

    Only a short window of tokens is decoded each time. It starts one settled piece before the text that is new,
    because decoders treat the first token of a sequence differently (SentencePiece drops its leading space). A
    text that ends in U+FFFD may end in the first bytes of a character, so it waits for more tokens; more than
    three of them cannot be one unfinished character, and then all but the last U+FFFD is final.

    The one exception to exactness: decoders with byte fallback replace a whole run of byte tokens when any of it
    is invalid UTF-8, valid characters that were already shown included.
    """

    # Enough tokens for the last, unfinished character and for UTF-8 to synchronize before it.
    _INVALID_WINDOW = 2 * _LONGEST_CHARACTER

    def __init__(self, tokenizer: Decoder, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window: list[int] = []
        self._settled = 0  # the first tokens of the window: all their text was returned
        self._returned = 0  # characters of the window's text that were returned

    def push(self, token_id: int) -> str:
        # A token outside the tokenizer's vocabulary (padding of the embedding table) has no text.
        if token_id in self._skipped or token_id >= self._tokenizer.vocab_size:
            return ""
        self._window.append(token_id)
        text = self._decode()
        if not text.endswith(_REPLACEMENT):
            new_text = text[self._returned :]
            self._window = self._window[self._settled :]
            self._settled = len(self._window)
            self._returned = len(self._decode())
            return new_text
        if len(self._window) - self._settled < _LONGEST_CHARACTER:
            return ""
        new_text = text[self._returned : -1]
        self._window = self._window[-self._INVALID_WINDOW :]
        self._settled = 0
        self._returned = len(self._decode()) - 1
        return new_text

    def flush(self) -> str:
        """The rest of the text, an unfinished character included."""
        text = self._decode()
        new_text = text[self._returned :]
        self._returned = len(text)
        return new_text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


class _StopMatcher:
    """Looks for stop strings in a text that arrives in pieces (Knuth, Morris and Pratt, one automaton a string)."""

    def __init__(self, stops: Sequence[str]) -> None:
        # Longest first, so that of two that end at the same character the longer is found.
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that is certainly outside every stop string, and the stop string that matched."""
        start = len(self._held)
        self._held += text
        for end, character in enumerate(text, start + 1):
            matched = [automaton.stop for automaton in self._automata if automaton.step(character)]
            if matched:
                return self._held[: end - len(matched[0])], matched[0]
        kept = max(automaton.matched for automaton in self._automata)
        cut = len(self._held) - kept
        safe, self._held = self._held[:cut], self._held[cut:]
        return safe, None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class _Automaton:
    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        """Length of the longest beginning of the stop string that the text ends with."""
        # borders[k]: the longest proper beginning of stop[:k] that is also its end.
        self._borders = [0, 0]
        for character in stop[1:]:
            self._borders.append(self._extended(self._borders[-1], character))

    def step(self, character: str) -> bool:
        """Advances by one character of the text; true when it completes the stop string."""
        self.matched = self._extended(self.matched, character)
        return self.matched == len(self.stop)

    def _extended(self, length: int, character: str) -> int:
        while length and self.stop[length] != character:
            length = self._borders[length]
        return length + (self.stop[length] == character)
