"""The log of requests: what was asked for, and how it ended."""

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from nibble.observability.generation_life import GenerationLife
from nibble.observability.request_context import RequestContext

logger = logging.getLogger(__name__)

_PARTIAL_TOKENS = 512
_PARTIAL_CHARACTERS = 2048
_LONGEST_PATH = 256


class RequestLog:
    """Levels as SGLang's. 0: numbers; 1: and sampling parameters; 2: and the beginning of prompt and text; 3: all."""

    def __init__(self, level: int, decode: Callable[[list[int]], str]) -> None:
        """`decode` turns the tokens of a prompt back into text, special tokens included."""
        self._level = level
        self._decode = decode

    def on_start(self, life: GenerationLife) -> None:
        request = life.request
        fields: dict[str, Any] = {"generation": request.request_id, "prompt_tokens": len(request.input_ids)}
        if self._level >= 1:
            fields["sampling"] = msgspec.to_builtins(request.sampling)
        if self._level >= 2:
            tokens = request.input_ids if self._level >= 3 else request.input_ids[:_PARTIAL_TOKENS]
            fields["prompt"] = self._text(self._decode(tokens))
        logger.info("generation received", extra={"fields": fields})

    def on_tokens(self, life: GenerationLife, num_tokens: int, seconds: float) -> None:
        """Not worth a line."""

    def on_end(self, life: GenerationLife) -> None:
        assert life.ended_at is not None
        fields: dict[str, Any] = {
            "generation": life.request.request_id,
            "finish_reason": life.ended,
            "prompt_tokens": len(life.request.input_ids),
            "completion_tokens": life.num_tokens,
            "e2e_latency": round(life.ended_at - life.received_at, 6),
        }
        if life.first_token_at is not None:
            fields["time_to_first_token"] = round(life.first_token_at - life.received_at, 6)
        if life.output is not None:
            fields |= {"cached_tokens": life.output.cached_tokens, "dp_rank": life.output.dp_rank}
            if self._level >= 2:
                fields["text"] = self._text(life.output.text)
        logger.info("generation finished", extra={"fields": fields})

    def on_response(self, context: RequestContext, method: str, path: str, status: int) -> None:
        """One HTTP request was answered."""
        seconds = round(time.monotonic() - context.received_at, 6)
        fields = {"method": method, "path": path[:_LONGEST_PATH], "status": status, "seconds": seconds}
        logger.info("answered", extra={"fields": fields})

    def _text(self, text: str) -> str:
        if self._level >= 3 or len(text) <= _PARTIAL_CHARACTERS:
            return text
        return text[:_PARTIAL_CHARACTERS] + "…"
