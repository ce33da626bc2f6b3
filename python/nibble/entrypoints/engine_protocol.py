"""What the HTTP surface needs of the engine below it."""

from collections.abc import AsyncGenerator
from typing import Any, Literal, Protocol

from nibble.generation import GenerationOutput, GenerationRequest
from nibble.ipc.messages import StartProfile
from nibble.tokenizer.tokenizer import Tokenizer

EngineState = Literal["starting", "ready", "draining", "dead"]


class EngineClient(Protocol):
    """A running engine. All methods belong to the event loop's thread."""

    tokenizer: Tokenizer
    served_model_name: str
    vocab_size: int
    context_length: int
    """Most tokens of a prompt and its continuation together."""
    dp_size: int
    takes_priorities: bool
    """Whether requests may bring a priority."""

    def is_ready(self) -> bool:
        """Whether new requests are accepted now."""
        ...

    def state(self) -> EngineState: ...

    def model_info(self) -> dict[str, Any]:
        """What `/model_info` answers."""
        ...

    def server_info(self) -> dict[str, Any]:
        """What `/server_info` answers: the flags, without secrets, and what was resolved from them."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        """Cumulative snapshots, the last one with a finish reason. Closing the generator aborts the request.

        Raises RequestError, OverloadedError or EngineDeadError, before the first snapshot or instead of the next.
        """
        ...

    def flush_cache(self) -> None:
        """Forgets all cached prefixes. Raises RequestError while any request runs or waits, or EngineDeadError."""
        ...

    def start_profile(self, profile: StartProfile) -> None:
        """Records what all ranks do. Raises RequestError for a folder or an activity that can't be."""
        ...

    async def stop_profile(self) -> list[str]:
        """Ends it and returns the files of the ranks' traces. Raises RequestError when there are none."""
        ...

    def abort(self, request_id: str) -> None:
        """Ends one request with finish reason "abort"; an id that is not running is ignored."""
        ...
