"""What the answers of completions and of chat completions have in common."""

import time
from collections.abc import Sequence
from typing import Any

from nibble.generation import FinishReason, GenerationOutput, TokenLogprob
from nibble.observability.request_context import unique_request_id


def response_head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that a response and each of its chunks begin with."""
    return {"id": f"{prefix}-{unique_request_id()}", "object": kind, "created": int(time.time()), "model": model}


def finish_fields(reason: FinishReason | None) -> dict[str, Any]:
    """`finish_reason`, and in SGLang's `matched_stop` the stop string or token id that ended the text."""
    return {
        "finish_reason": None if reason is None else reason.type,
        "matched_stop": None if reason is None else reason.matched,
    }


def usage(outputs: Sequence[GenerationOutput], n: int) -> dict[str, Any]:
    """Token counts of all choices; a prompt counts once, however many choices it has, as its first choice saw it."""
    prompts = outputs[::n]
    prompt_tokens = sum(output.prompt_tokens for output in prompts)
    completion_tokens = sum(output.completion_tokens for output in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in prompts)},
    }


class Delta:
    """What each snapshot of one choice adds to the one before."""

    def __init__(self) -> None:
        self._characters = 0
        self._tokens = 0

    def advance(self, output: GenerationOutput) -> tuple[str, Sequence[TokenLogprob]]:
        """New text and the logprobs of new tokens."""
        text = output.text[self._characters :]
        logprobs = (output.logprobs or ())[self._tokens :]
        self._characters += len(text)
        self._tokens += len(logprobs)
        return text, logprobs
