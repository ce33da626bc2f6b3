"""How one request is sampled and when it stops, with the limits of every field."""

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Range:
    """Of a number; without `least` it must be greater than `low`."""

    low: int
    high: int | None = None
    least: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.least else value > self.low
        return above and value <= (math.inf if self.high is None else self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"at least {self.low}"
        return (
            f"between {self.low} and {self.high}" if self.least else f"greater than {self.low} and at most {self.high}"
        )


RANGES = {
    "max_new_tokens": Range(0),
    "min_new_tokens": Range(0),
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, least=False),
    "min_p": Range(0, 1),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "repetition_penalty": Range(0, 2, least=False),
    "n": Range(1, MAX_CHOICES),
}
BIAS_RANGE = Range(-100, 100)


def validate_sampling_params(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError with the field, the value and the limit for the first field out of range."""
    for field, limits in RANGES.items():
        value = getattr(params, field)
        if not math.isfinite(value) or value not in limits:
            raise RequestError(f"{field} must be {limits}, got {value}", field)
    if params.top_k < 1 and params.top_k != -1:
        raise RequestError(f"top_k must be -1 (every token) or at least 1, got {params.top_k}", "top_k")
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
        if not math.isfinite(bias) or bias not in BIAS_RANGE:
            raise RequestError(f"logit_bias must be {BIAS_RANGE}, got {bias} for token {token}", "logit_bias")


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
