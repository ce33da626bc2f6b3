"""What one step of one rank processes: a pure function of a snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RequestView(NamedTuple):
    """`computed` tokens are in the KV cache or, of a waiting request, would be found there; `remaining` must follow, 1
    while decoding. `pages` pages are in use already: its own, or for a waiting request those it would share with
    running ones.
    """

    computed: int
    remaining: int
    pages: int


@dataclass(frozen=True)
class Snapshot:
    """`running` is ordered oldest first, `waiting` next to run first (as many as could be admitted suffice)."""

    running: Sequence[RequestView]
    waiting: Sequence[RequestView]
    available_pages: int
    """Free, or cached and in use by nobody."""
    page_size: int
    prefill_budget: int
    max_running: int


@dataclass(frozen=True)
class StepPlan:
    """Indices into the snapshot."""

    running: tuple[tuple[int, int], ...] = ()
    """(index, tokens) of running requests that take part."""
    admitted: tuple[int, ...] = ()
    """Tokens of each request that leaves the head of the waiting queue."""
    retracts: bool = False
    """There is no step before the youngest running request has given its pages back, to start again later."""


def plan_step(snapshot: Snapshot) -> StepPlan:
    """Decodes every running request, goes on with started prompts, then admits new ones, first come first served.

    Prompts share `prefill_budget` tokens a step. When pages run out the youngest running request is retracted, so that
    the oldest always gets on. How many pages that yields depends on who shares them, so it takes a new snapshot.
    """
    free, budget = snapshot.available_pages, snapshot.prefill_budget
    running: list[tuple[int, int]] = []
    for index, request in enumerate(snapshot.running):
        tokens = request.remaining if request.remaining == 1 else min(request.remaining, budget)
        free -= pages_for(request.computed + tokens, snapshot.page_size) - request.pages
        if free < 0:
            return StepPlan(retracts=True)
        if tokens:
            running.append((index, tokens))
            budget -= tokens if request.remaining > 1 else 0
    return StepPlan(tuple(running), _admit(snapshot, free, budget))


def _admit(snapshot: Snapshot, free: int, budget: int) -> tuple[int, ...]:
    """Tokens of each request that is admitted, with `free` pages and `budget` prompt tokens left."""
    admitted: list[int] = []
    count = len(snapshot.running)
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


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
