"""The life of a generation as its client sees it, for whoever counts or logs it."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

from nibble.generation import GenerationOutput, GenerationRequest
from nibble.observability.request_context import current_request
from nibble.utils.errors import OverloadedError, RequestError

End = Literal["stop", "length", "abort", "error", "refused"]
"""`abort`: by the client, which may have left. `refused`: the engine never took it."""


class GenerationObserver(Protocol):
    def on_start(self, life: "GenerationLife") -> None: ...

    def on_tokens(self, life: "GenerationLife", num_tokens: int, seconds: float) -> None:
        """`num_tokens` more, `seconds` after the last news, or after the request's arrival for the first ones."""
        ...

    def on_end(self, life: "GenerationLife") -> None: ...


class GenerationLife:
    """Times are `time.monotonic()`, in seconds."""

    def __init__(self, request: GenerationRequest, observers: Sequence[GenerationObserver]) -> None:
        context = current_request.get()
        self.request = request
        self.received_at = time.monotonic() if context is None else context.received_at
        self.output: GenerationOutput | None = None
        self.num_tokens = 0
        self.first_token_at: float | None = None
        self.news_at = self.received_at
        """When the newest tokens came, or the request if there are none."""
        self.ended: End | None = None
        self.ended_at: float | None = None
        self._observers = observers
        for observer in observers:
            observer.on_start(self)

    def advance(self, output: GenerationOutput) -> None:
        """Takes a snapshot; the last one ends the life."""
        self.output = output
        new = output.completion_tokens - self.num_tokens
        if new > 0:
            now = time.monotonic()
            for observer in self._observers:
                observer.on_tokens(self, new, now - self.news_at)
            self.num_tokens += new
            self.news_at = now
            if self.first_token_at is None:
                self.first_token_at = now
        if output.finish_reason is not None:
            self.end(output.finish_reason.type)

    def end(self, reason: End) -> None:
        """Only the first reason counts."""
        if self.ended is None:
            self.ended, self.ended_at = reason, time.monotonic()
            for observer in self._observers:
                observer.on_end(self)


@contextmanager
def follow_generations(
    requests: Sequence[GenerationRequest], observers: Sequence[GenerationObserver]
) -> Iterator[list[GenerationLife]]:
    """One life for each request. Where the block is left before they end, how it is left says why they do."""
    lives = [GenerationLife(request, observers) for request in requests]
    reason: End = "abort"
    try:
        yield lives
    except (GeneratorExit, asyncio.CancelledError):
        raise
    except (RequestError, OverloadedError):
        reason = "refused"
        raise
    except Exception:
        reason = "error"
        raise
    finally:
        for life in lives:
            life.end(reason)
