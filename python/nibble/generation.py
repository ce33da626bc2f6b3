"""What goes into the engine and what comes out of it, one request at a time."""

from dataclasses import dataclass
from typing import Literal

from nibble.sampling_params import SamplingParams


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, tokenized, to be continued once (`sampling.n` is expanded by the caller)."""

    request_id: str
    input_ids: list[int]
    sampling: SamplingParams
    data_parallel_rank: int | None = None
    """The DP rank to run on; None leaves the choice to the load balancer."""
    priority: int = 0
    """Higher goes first; 0 unless --enable-priority-scheduling."""
    return_logprob: bool = False
    top_logprobs_num: int = 0
    token_ids_logprob: tuple[int, ...] = ()
    """Tokens whose log-probability is wanted at every position."""
    logprob_start_len: int | None = None
    """From this token of the prompt on, log-probabilities of the prompt are wanted; None: of none of it."""
    update_interval: int = 1
    """Tokens between two snapshots of the output, besides the last."""


@dataclass(frozen=True)
class FinishReason:
    """Why a generation ended, as SGLang reports it."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    """For "stop": the token id or the stop string that matched."""
    length: int | None = None
    """For "length": the number of tokens generated."""
    message: str | None = None
    """For "abort": what happened."""


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one token, and of others at its position: the likeliest, best first, and those named."""

    logprob: float
    token_id: int
    top: tuple[tuple[float, int], ...] = ()
    named: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class PromptLogprobs:
    """From some token of the prompt on: that token, and the log-probabilities of those that follow it."""

    first_token_id: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class GenerationOutput:
    """A snapshot of one request. `text`, `output_ids` and `logprobs` are cumulative; the last one is finished."""

    request_id: str
    text: str
    output_ids: list[int]
    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt whose keys and values were in the prefix cache."""
    dp_rank: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per generated token when the request asked for logprobs."""
    prompt_logprobs: PromptLogprobs | None = None
    """When the request asked for them."""

    @property
    def completion_tokens(self) -> int:
        return len(self.output_ids)
