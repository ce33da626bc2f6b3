"""Schedulers and requests of a few pages, and how a test drives them."""

from collections.abc import Sequence
from typing import Any

from nibble.ipc.messages import NewRequest
from nibble.sampling_params import SamplingParams
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import ScheduledRequest, Scheduler, SchedulerLimits

EOS = 0
CONTEXT = 32
PAGE = 4


def make_scheduler(
    num_pages: int = 16, budget: int = 8, max_running: int = 4, reuse: bool = True, **limits: Any
) -> Scheduler:
    limits = SchedulerLimits(PAGE, budget, max_running, CONTEXT, frozenset({EOS}), reuse, **limits)
    return Scheduler(limits, num_pages)


def make_request(
    name: str, prompt: int | Sequence[int], max_new_tokens: int, priority: int = 0, **sampling: object
) -> Request:
    """A request with this prompt, or one of that many tokens 1, 2, 3, …"""
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else list(prompt)
    return Request(NewRequest(1, name, tokens, params, 0, False, 0, 1, priority))


def finish(scheduler: Scheduler, step: Sequence[ScheduledRequest], token: int | None = 7) -> list[object]:
    scheduler.begin_step(step)
    return [booked.reason for booked in scheduler.finish_step(step, [token for entry in step if entry.samples])]


def run(scheduler: Scheduler, *requests: Request) -> int:
    """Runs these requests, and those that are there already, to their ends. Returns the tokens it computed."""
    computed = 0
    for request in requests:
        scheduler.add(request)
    while not scheduler.is_idle:
        step = scheduler.schedule()
        computed += sum(entry.num_tokens for entry in step)
        finish(scheduler, step)
    scheduler.check_idle()
    return computed


def start_order(scheduler: Scheduler) -> list[str]:
    """The names of requests as they start, until all have ended."""
    started: list[str] = []
    while not scheduler.is_idle:
        step = scheduler.schedule()
        started += [r.request_id for r in scheduler.running if r.request_id not in started]
        finish(scheduler, step)
    scheduler.check_idle()
    return started


def begin(scheduler: Scheduler) -> list[ScheduledRequest]:
    step = scheduler.schedule()
    assert step is not None
    scheduler.begin_step(step)
    return step
