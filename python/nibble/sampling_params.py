"""How one request is sampled and when it stops, with the limits of every field."""

import math
from collections.abc import Callable

import msgspec

from nibble.structured_output.grammar import Grammar
from nibble.utils.errors import RequestError

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_LOGIT_BIAS = 1024
MAX_CHOICES = 128
MAX_NAMED_TOKENS = 1024
"""Of `token_ids_logprob`."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """One request's sampling. Temperature 0 is greedy; `top_k` -1 means every token.

    `n`, `stop`, `stop_regex` and `skip_special_tokens` are about text and are handled where the tokenizer lives; the
    rest is handled by the rank that runs the request.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    sampling_seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    n: int = 1
    grammar: Grammar | None = None
    """What the answer must look like. Where it allows only its end, `ignore_eos` and `min_new_tokens` give way."""

    @property
    def has_penalties(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1.0)


_RANGES: list[tuple[str, Callable[[float], bool], str]] = [
    ("max_new_tokens", lambda v: v >= 0, "must be at least 0"),
    ("min_new_tokens", lambda v: v >= 0, "must be at least 0"),
    ("temperature", lambda v: 0 <= v <= 100, "must be between 0 and 100"),
    ("top_p", lambda v: 0 < v <= 1, "must be greater than 0 and at most 1"),
    ("top_k", lambda v: v == -1 or v >= 1, "must be -1 (every token) or at least 1"),
    ("min_p", lambda v: 0 <= v <= 1, "must be between 0 and 1"),
    ("frequency_penalty", lambda v: -2 <= v <= 2, "must be between -2 and 2"),
    ("presence_penalty", lambda v: -2 <= v <= 2, "must be between -2 and 2"),
    ("repetition_penalty", lambda v: 0 < v <= 2, "must be greater than 0 and at most 2"),
    ("n", lambda v: 1 <= v <= MAX_CHOICES, f"must be between 1 and {MAX_CHOICES}"),
]


def validate_sampling_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError with the field, the value and the limit for the first field out of range."""
    for field, allowed, limit in _RANGES:
        value = getattr(params, field)
        if not math.isfinite(value) or not allowed(value):
            raise RequestError(f"{field} {limit}, got {value}", field)
    if params.min_new_tokens > params.max_new_tokens:
        raise RequestError(
            f"min_new_tokens ({params.min_new_tokens}) must not exceed max_new_tokens ({params.max_new_tokens})",
            "min_new_tokens",
        )
    if params.sampling_seed is not None and not -(2**63) <= params.sampling_seed < 2**63:
        raise RequestError(f"sampling_seed must fit in 64 bits, got {params.sampling_seed}", "sampling_seed")
    _validate_stops(params)
    validate_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    validate_token_ids("logit_bias", tuple(params.logit_bias), vocab_size)
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens, got {len(params.logit_bias)}", "logit_bias"
        )
    for token, bias in params.logit_bias.items():
        if not math.isfinite(bias) or not -100 <= bias <= 100:
            raise RequestError(f"logit_bias must be between -100 and 100, got {bias} for token {token}", "logit_bias")


def _validate_stops(params: SamplingParams) -> None:
    for field in ("stop", "stop_regex", "stop_token_ids"):
        stops = getattr(params, field)
        if len(stops) > MAX_STOPS:
            raise RequestError(f"{field} takes at most {MAX_STOPS} entries, got {len(stops)}", field)
    for field, stops in (("stop", params.stop), ("stop_regex", params.stop_regex)):
        for stop in stops:
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise RequestError(
                    f"entries of {field} must have between 1 and {MAX_STOP_LENGTH} characters, got {len(stop)}", field
                )


def validate_token_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raises RequestError for one outside the vocabulary."""
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(f"{field} holds token {token}, outside the vocabulary (0 to {vocab_size - 1})", field)
