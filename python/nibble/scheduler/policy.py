"""What one step of one rank processes, and who is admitted first: pure functions of a snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RequestView(NamedTuple):
    """A prompt. `computed` tokens are in the KV cache or, of a waiting request, would be found there; `remaining` must
    follow. `pages` pages are in use already: its own, or for a waiting request those it would share with running ones.
    """

    computed: int
    remaining: int
    pages: int


class Claim(NamedTuple):
    """What decides when a waiting request's turn is. `overdue` ones were overtaken as often as may be."""

    overdue: bool
    priority: int
    cached: int


@dataclass(frozen=True)
class Snapshot:
    """Running requests decode, or they are prompts of which more than one token remains, or their last token is on its
    way.
    """

    num_running: int
    decode_pages: int
    """Pages that the next tokens of the decoding requests need."""
    prompts: Sequence[RequestView]
    """Those of running requests, in the order in which they get on."""
    waiting: Sequence[RequestView]
    """Next to run first; as many as could be admitted suffice."""
    available_pages: int
    """Free, or cached and in use by nobody."""
    page_size: int
    prefill_budget: int
    max_running: int


@dataclass(frozen=True)
class StepPlan:
    """Every decoding request takes part."""

    prompts: tuple[int, ...] = ()
    """Tokens of each running prompt; 0 for those that the budget does not reach."""
    admitted: tuple[int, ...] = ()
    """Tokens of each request that leaves the head of `waiting`."""
    retracts: bool = False
    """There is no step before the last of the running requests has given its pages back, to start again later."""


def plan_step(snapshot: Snapshot) -> StepPlan:
    """Decodes what decodes, goes on with started prompts, then admits new ones.

    Prompts share `prefill_budget` tokens a step. When pages run out the last running request is retracted, so that
    the first always gets on. How many pages that yields depends on who shares them, so it takes a new snapshot.
    """
    free, budget = snapshot.available_pages - snapshot.decode_pages, snapshot.prefill_budget
    prompts: list[int] = []
    for prompt in snapshot.prompts:
        tokens = min(prompt.remaining, budget)
        free -= pages_for(prompt.computed + tokens, snapshot.page_size) - prompt.pages
        budget -= tokens
        prompts.append(tokens)
    if free < 0:
        return StepPlan(retracts=True)
    return StepPlan(tuple(prompts), _admit(snapshot, free, budget))


def _admit(snapshot: Snapshot, free: int, budget: int) -> tuple[int, ...]:
    """Tokens of each request that is admitted, with `free` pages and `budget` prompt tokens left."""
    admitted: list[int] = []
    count = snapshot.num_running
    for request in snapshot.waiting:
        needed = pages_for(request.computed + request.remaining, snapshot.page_size) - request.pages
        # One page for each running request, since each will soon want its next one.
        if budget == 0 or count == snapshot.max_running or needed + count > free:
            break
        tokens = min(request.remaining, budget)
        admitted.append(tokens)
        budget -= tokens
        free -= needed
        count += 1
    return tuple(admitted)


def admission_order(claims: Sequence[Claim]) -> list[int]:
    """The order of turns under "lpm", as indices into `claims`, which come in the order of arrival."""

    def turn(index: int) -> tuple[bool, int, int]:
        claim = claims[index]
        return (False, 0, 0) if claim.overdue else (True, -claim.priority, -claim.cached)

    return sorted(range(len(claims)), key=turn)


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
