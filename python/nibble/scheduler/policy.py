"""What one step of one rank processes: a pure function of a snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class RequestView(NamedTuple):
    """`computed` tokens are in the KV cache, in `pages` pages; `remaining` must follow, 1 while decoding."""

    computed: int
    remaining: int
    pages: int


@dataclass(frozen=True)
class Snapshot:
    """`running` is ordered oldest first, `waiting` next to run first (as many as could be admitted suffice)."""

    running: Sequence[RequestView]
    waiting: Sequence[RequestView]
    free_pages: int
    page_size: int
    prefill_budget: int
    max_running: int


@dataclass(frozen=True)
class StepPlan:
    """Indices into the snapshot. A retracted request gives its pages back and starts again later."""

    running: tuple[tuple[int, int], ...]
    """(index, tokens) of running requests that take part."""
    admitted: tuple[int, ...]
    """Tokens of each request that leaves the head of the waiting queue."""
    retracted: tuple[int, ...]
    """Running requests, youngest first."""


def plan_step(snapshot: Snapshot) -> StepPlan:
    """Decodes every running request, goes on with started prompts, then admits new ones, first come first served.

    Prompts share `prefill_budget` tokens a step. When pages run out the youngest running requests are retracted,
    so that the oldest always gets on; while that happens nobody is admitted.
    """
    running, retracted, free, budget = _continue_running(snapshot)
    admitted: list[int] = []
    count = len(running)
    if not retracted:
        for request in snapshot.waiting:
            needed = pages_for(request.remaining, snapshot.page_size)
            # One page for each running request, since each will soon want its next one.
            if budget == 0 or count == snapshot.max_running or needed + count > free:
                break
            tokens = min(request.remaining, budget)
            admitted.append(tokens)
            budget -= tokens
            free -= needed
            count += 1
    return StepPlan(tuple(running), tuple(admitted), tuple(retracted))


def _continue_running(snapshot: Snapshot) -> tuple[list[tuple[int, int]], list[int], int, int]:
    scheduled: list[tuple[int, int]] = []
    retracted: list[int] = []
    free, budget = snapshot.free_pages, snapshot.prefill_budget
    last = len(snapshot.running)  # requests from here on are retracted
    index = 0
    while index < last:
        request = snapshot.running[index]
        tokens = request.remaining if request.remaining == 1 else min(request.remaining, budget)
        needed = pages_for(request.computed + tokens, snapshot.page_size) - request.pages
        while needed > free and last > index:
            last -= 1
            retracted.append(last)
            free += snapshot.running[last].pages
        if last > index and tokens:
            scheduled.append((index, tokens))
            free -= needed
            budget -= tokens if request.remaining > 1 else 0
        index += 1
    return scheduled, retracted, free, budget


def pages_for(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
