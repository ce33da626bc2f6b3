"""From validated requests to the generations that they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from nibble.entrypoints.engine_protocol import EngineClient
from nibble.generation import GenerationRequest
from nibble.sampling_params import SamplingParams, validate_sampling_params, validate_token_ids
from nibble.tokenizer.stop_regex import compile_stop_regexes
from nibble.utils.errors import RequestError

MAX_PRIORITY = 100
MAX_GENERATIONS = 4096
"""Most prompts times choices of one HTTP request."""


@dataclass(frozen=True)
class Choice:
    """One of the generations that a request asked for, under the id that its client knows."""

    client_id: str
    generation: GenerationRequest


@dataclass(frozen=True)
class GenerationOptions:
    """What a request asks for besides the sampling of its text."""

    data_parallel_rank: int | None = None
    return_logprob: bool = False
    top_logprobs_num: int = 0
    priority: int | None = None
    token_ids_logprob: tuple[int, ...] = ()
    logprob_start_len: int | None = None
    """The first token of the prompt that log-probabilities are wanted from; None: of none of it."""


def choices_of_prompt(
    engine: EngineClient,
    client_id: str,
    prompt_id: str,
    input_ids: list[int],
    sampling: SamplingParams,
    options: GenerationOptions,
    prompt_field: str,
) -> list[Choice]:
    """`sampling.n` generations of one prompt. Choice i is sampled with the seed plus i.

    Raises RequestError for whatever is out of range; `prompt_field` is what the route calls the prompt.
    """
    check_token_ids(input_ids, engine.vocab_size, prompt_field)
    _check_rank(options.data_parallel_rank, engine.dp_size)
    _check_priority(options.priority, engine.takes_priorities)
    validate_sampling_params(sampling, engine.vocab_size)
    compile_stop_regexes(sampling.stop_regex)
    validate_token_ids("token_ids_logprob", options.token_ids_logprob, engine.vocab_size)
    _check_logprob_start(options.logprob_start_len, len(input_ids))
    return [
        Choice(
            client_id,
            GenerationRequest(
                request_id=prompt_id if sampling.n == 1 else f"{prompt_id}-{i}",
                input_ids=input_ids,
                sampling=msgspec.structs.replace(sampling, n=1, sampling_seed=_choice_seed(sampling.sampling_seed, i)),
                data_parallel_rank=options.data_parallel_rank,
                priority=options.priority or 0,
                return_logprob=options.return_logprob,
                top_logprobs_num=options.top_logprobs_num,
                token_ids_logprob=options.token_ids_logprob,
                logprob_start_len=options.logprob_start_len,
            ),
        )
        for i in range(sampling.n)
    ]


def check_num_generations(num_generations: int) -> None:
    """Raises RequestError when one HTTP request asks for too many."""
    if num_generations > MAX_GENERATIONS:
        raise RequestError(
            f"n choices for each prompt make {num_generations} generations, more than the limit of {MAX_GENERATIONS};"
            " send several requests",
            "n",
        )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raises RequestError when there is no token, or one outside the vocabulary."""
    if not token_ids:
        raise RequestError(f"{field} is empty; it needs at least one token", field)
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"{field} holds token {token_id}, outside the vocabulary (0 to {vocab_size - 1})", field)


def resolve_max_new_tokens(
    requested: int | None, default: int | None, prompt_tokens: int, context_length: int, field: str, prompt_field: str
) -> int:
    """How many tokens to generate: what was requested, or the default, or else the rest of the context.

    `field` and `prompt_field` are what the route calls the limit and the prompt. Raises RequestError when the context
    has no room for it.
    """
    room = context_length - prompt_tokens
    if room < (requested != 0):
        raise RequestError(
            f"the prompt has {prompt_tokens} tokens, which leaves no room for an answer in the context of"
            f" {context_length} tokens",
            prompt_field,
        )
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise RequestError(
            f"{field} ({requested}) and the prompt ({prompt_tokens} tokens) exceed the context of {context_length}"
            f" tokens; {field} can be at most {room}",
            field,
        )
    return requested


def _choice_seed(seed: int | None, choice: int) -> int | None:
    # Seeds are 64-bit integers and wrap around like them.
    return None if seed is None else (seed + choice + 2**63) % 2**64 - 2**63


def _check_logprob_start(start: int | None, prompt_tokens: int) -> None:
    if start is not None and start >= prompt_tokens:
        raise RequestError(
            f"logprob_start_len ({start}) must be less than the {prompt_tokens} tokens of the prompt",
            "logprob_start_len",
        )


def _check_rank(rank: int | None, dp_size: int) -> None:
    if rank is not None and not 0 <= rank < dp_size:
        raise RequestError(f"data_parallel_rank must be between 0 and {dp_size - 1}, got {rank}", "data_parallel_rank")


def _check_priority(priority: int | None, takes_priorities: bool) -> None:
    if priority is None:
        return
    if not takes_priorities:
        raise RequestError(
            "priority is not used by this server; leave it out, or start it with --enable-priority-scheduling",
            "priority",
        )
    if abs(priority) > MAX_PRIORITY:
        raise RequestError(
            f"priority must be between {-MAX_PRIORITY} and {MAX_PRIORITY} (first), got {priority}", "priority"
        )
