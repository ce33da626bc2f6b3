"""Log-probabilities of generated tokens, in the three forms that clients know."""

import codecs
from collections.abc import Sequence
from typing import Any

from nibble.generation import TokenLogprob
from nibble.tokenizer.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20
_LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI uses the same figure."""


def finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def native_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob]) -> list[list[Any]]:
    """`[logprob, token id, text]` for each token; the text is null without a tokenizer."""
    return [_native_triple(tokenizer, entry.logprob, entry.token_id) for entry in logprobs]


def native_top_logprobs(tokenizer: Tokenizer | None, logprobs: Sequence[TokenLogprob]) -> list[list[list[Any]]]:
    """For each position, such triples of the likeliest tokens, best first."""
    return [[_native_triple(tokenizer, logprob, token) for logprob, token in entry.top] for entry in logprobs]


def _native_triple(tokenizer: Tokenizer | None, logprob: float, token_id: int) -> list[Any]:
    text = None if tokenizer is None else tokenizer.token_bytes(token_id).decode(errors="replace")
    return [finite(logprob), token_id, text]


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

    def format(self, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """Tokens, their logprobs, the likeliest tokens by text (the sampled one included) and where each begins."""
        formatted: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in logprobs:
            content = self._tokenizer.token_bytes(entry.token_id)
            token = _token_text(content)
            likeliest = {_token_text(self._tokenizer.token_bytes(other)): finite(value) for value, other in entry.top}
            formatted["tokens"].append(token)
            formatted["token_logprobs"].append(finite(entry.logprob))
            formatted["top_logprobs"].append(likeliest | {token: finite(entry.logprob)})
            formatted["text_offset"].append(self._text_offset)
            if entry.token_id not in self._hidden:
                self._text_offset += len(self._utf8.decode(content))
        return formatted


def _token_text(content: bytes) -> str:
    """A token's text; one that holds a part of a character is shown by its bytes, as OpenAI does."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
