"""Log-probabilities of tokens, in the three forms that clients know."""

import codecs
from collections.abc import Sequence
from typing import Any

from nibble.generation import PromptLogprobs, TokenLogprob
from nibble.tokenizer.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20
_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI uses the same figure."""


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def native_logprob(tokenizer: Tokenizer | None, logprob: float | None, token_id: int) -> list[Any]:
    """`[logprob, token id, text]`; the text is null without a tokenizer."""
    text = None if tokenizer is None else tokenizer.token_bytes(token_id).decode(errors="replace")
    return [None if logprob is None else finite(logprob), token_id, text]


def native_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[tuple[float, int]]) -> list[list[Any]]:
    """Such triples of several tokens at one position."""
    return [native_logprob(tokenizer, logprob, token_id) for logprob, token_id in logprobs]


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` of a chat choice: token, logprob and bytes, with the likeliest tokens at each position."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, entry.logprob, entry.token_id),
                "top_logprobs": [_chat_token(tokenizer, logprob, token) for logprob, token in entry.top],
            }
            for entry in logprobs
        ],
        "refusal": None,
    }


def _chat_token(tokenizer: Tokenizer, logprob: float, token_id: int) -> dict[str, Any]:
    content = tokenizer.token_bytes(token_id)
    return {"token": _token_text(content), "logprob": finite(logprob), "bytes": list(content)}


class CompletionLogprobs:
    """The `logprobs` of a completion choice, which may be formatted in several pieces as tokens arrive."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, text_offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._text_offset = text_offset
        self._has_prompt = False

    def format(self, logprobs: Sequence[TokenLogprob], prompt: PromptLogprobs | None = None) -> dict[str, list[Any]]:
        """Tokens, their logprobs, the likeliest tokens by text (the one there included) and where each begins.

        The tokens of a `prompt` come first, once; the first of them has no logprob.
        """
        formatted: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if prompt is not None and not self._has_prompt:
            self._has_prompt = True
            self._add(formatted, prompt.first_token_id, None, None)
            logprobs = [*prompt.logprobs, *logprobs]
        for entry in logprobs:
            token = _token_text(self._tokenizer.token_bytes(entry.token_id))
            likeliest = {_token_text(self._tokenizer.token_bytes(other)): finite(value) for value, other in entry.top}
            self._add(formatted, entry.token_id, finite(entry.logprob), likeliest | {token: finite(entry.logprob)})
        return formatted

    def _add(
        self, formatted: dict[str, list[Any]], token_id: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        content = self._tokenizer.token_bytes(token_id)
        formatted["tokens"].append(_token_text(content))
        formatted["token_logprobs"].append(logprob)
        formatted["top_logprobs"].append(top)
        formatted["text_offset"].append(self._text_offset)
        if token_id not in self._hidden:
            self._text_offset += len(self._utf8.decode(content))


def _token_text(content: bytes) -> str:
    """A token's text; one that holds a part of a character is shown by its bytes, as OpenAI does."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
