"""Requests of one rank, from arrival to last token. Knows no sockets and no tensors."""

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nibble.generation import FinishReason
from nibble.scheduler.kv_pages import KvPages
from nibble.scheduler.policy import Claim, RequestView, Snapshot, StepPlan, admission_order, plan_step
from nibble.scheduler.request import Request
from nibble.scheduler.waiting_queue import WaitingQueue


class ScheduledRequest(NamedTuple):
    """`num_tokens` of the request's next tokens go through the model in this step."""

    request: Request
    num_tokens: int
    samples: bool
    """Whether the step reaches the request's last token, so that a new one is sampled."""


LPM_WINDOW = 64
"""The longest cached prefix is looked for among so many waiting requests."""


@dataclass(frozen=True)
class SchedulerLimits:
    page_size: int
    chunked_prefill_size: int
    max_running_requests: int
    context_length: int
    eos_token_ids: frozenset[int]
    reuse_prefixes: bool = True
    policy: str = "fcfs"
    """First come, first served, or "lpm": the longest prefix match first."""
    max_overtakes: int = 128


class Scheduler:
    """Decides what each step processes and keeps the books of requests; those of KV pages are `kv`."""

    def __init__(self, limits: SchedulerLimits, num_pages: int) -> None:
        self.limits = limits
        self.kv = KvPages(num_pages, limits.page_size, limits.reuse_prefixes)
        self.waiting = WaitingQueue(limits.max_overtakes)
        self.running: list[Request] = []
        """By precedence, then oldest first."""
        self.num_retracted = 0
        self.num_held = 0
        """Waiting requests that the last step would have admitted, had it been allowed to."""

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        self.kv.prepare(request)
        self.waiting.add(request)

    def abort(self, request_id: str) -> None:
        """Forgets a request; an unknown one has finished already."""
        if self.waiting.remove(request_id) is None:
            for request in self.running:
                if request.request_id == request_id:
                    self.running.remove(request)
                    self.kv.release(request)
                    return

    def schedule(self, may_admit: bool = True) -> list[ScheduledRequest]:
        """The next step, decoding requests first, with pages allocated. Empty when there is nothing to do.

        Unless it `may_admit`, no waiting request joins those that run.
        """
        candidates = self._candidates()
        plan, decoding, prompts = self._plan(candidates)
        while plan.retracts:
            self._retract_last()
            candidates = []
            plan, decoding, prompts = self._plan(candidates)
        self.num_held = 0 if may_admit else len(plan.admitted)
        step = [ScheduledRequest(request, 1, True) for request in decoding]
        step += [_scheduled(request, tokens) for request, tokens in zip(prompts, plan.prompts, strict=True) if tokens]
        if may_admit:
            step += [
                self._admit(request, tokens) for (request, _), tokens in zip(candidates, plan.admitted, strict=False)
            ]
        # Only now: the prefixes of all admitted requests are held, and what is evicted is nobody's.
        for entry in step:
            self.kv.grow(entry.request, entry.num_tokens)
        return sorted(step, key=_is_prompt)

    def finish_step(self, step: Sequence[ScheduledRequest], tokens: Sequence[int | None]) -> list[FinishReason | None]:
        """Books a step. `tokens` has one entry per request of the step that samples, None for a failed row.

        Returns, for each of those, how the request ended, or None if it goes on.
        """
        sampling = [entry.request for entry in step if entry.samples]
        for entry in step:
            entry.request.num_computed += entry.num_tokens
            entry.request.kv_is_finite = False  # until the logits after the last computed token say so
        reasons = [self._book_token(request, token) for request, token in zip(sampling, tokens, strict=True)]
        ended = {id(request) for request, reason in zip(sampling, reasons, strict=True) if reason}
        if ended:
            self.running = [request for request in self.running if id(request) not in ended]
        for entry in step:
            if entry.samples and (entry.num_tokens > 1 or entry.request.num_generated == 1):
                self.kv.share(entry.request)  # a prompt is complete
        return reasons

    def take_dirty_pages(self) -> list[int]:
        """Freed pages that may hold NaN, to be cleared before the next step."""
        return self.kv.take_dirty()

    def flush_cache(self) -> None:
        """Forgets the cached prefixes of all requests that have ended."""
        self.kv.flush()

    def check_idle(self) -> None:
        """Raises RuntimeError when pages are in use though no request is."""
        if self.is_idle:
            self.kv.check_idle()

    def _candidates(self) -> list[tuple[Request, RequestView]]:
        """The waiting requests that may be admitted, in the order of their turns."""
        slots = self.limits.max_running_requests - len(self.running)
        if slots <= 0 or not self.waiting:
            return []
        if self.limits.policy == "fcfs":
            return list(self._within_budget(self.waiting.head(slots)))
        window = self.waiting.head(LPM_WINDOW)
        views = [self._view(request) for request in window]
        claims = [
            Claim(self.waiting.is_overdue(request), request.priority, view.computed)
            for request, view in zip(window, views, strict=True)
        ]
        return [(window[index], views[index]) for index in admission_order(claims)]

    def _within_budget(self, requests: Iterable[Request]) -> Iterator[tuple[Request, RequestView]]:
        """As many as there are prompt tokens for in a step."""
        budget = self.limits.chunked_prefill_size
        for request in requests:
            if budget <= 0:
                return
            view = self._view(request)
            budget -= view.remaining
            yield request, view

    def _view(self, waiting: Request) -> RequestView:
        match = self.kv.match(waiting)
        computed = match.pages * self.limits.page_size
        return RequestView(computed, len(waiting.token_ids) - computed, match.locked_pages)

    def _plan(self, candidates: Sequence[tuple[Request, RequestView]]) -> tuple[StepPlan, list[Request], list[Request]]:
        """Also returns the running requests that decode and those that are prompts."""
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self.running:
            (decoding if request.num_remaining == 1 else prompts).append(request)
        page_size = self.limits.page_size
        plan = plan_step(
            Snapshot(
                num_decoding=len(decoding),
                decode_pages=sum(request.num_computed % page_size == 0 for request in decoding),
                prompts=[RequestView(r.num_computed, r.num_remaining, len(r.pages)) for r in prompts],
                waiting=[view for _, view in candidates],
                available_pages=self.kv.num_available,
                page_size=page_size,
                prefill_budget=self.limits.chunked_prefill_size,
                max_running=self.limits.max_running_requests,
            )
        )
        return plan, decoding, prompts

    def _admit(self, request: Request, num_tokens: int) -> ScheduledRequest:
        request.precedence = math.inf if self.waiting.is_overdue(request) else request.priority
        self.waiting.remove(request.request_id)
        self.kv.admit(request)
        bisect.insort(self.running, request, key=lambda running: (-running.precedence, running.arrival))
        return _scheduled(request, num_tokens)

    def _book_token(self, request: Request, token: int | None) -> FinishReason | None:
        request.kv_is_finite = token is not None
        if token is None:
            reason: FinishReason | None = FinishReason(
                "abort", message="the model produced numbers that are not finite for this request"
            )
        else:
            reason = request.append(token, self.limits.eos_token_ids, self.limits.context_length)
        if reason is not None:
            self.kv.release(request)
        return reason

    def _retract_last(self) -> None:
        request = self.running.pop()
        self.kv.release(request)
        self.kv.prepare(request)
        self.waiting.put_back(request)
        self.num_retracted += 1


def _scheduled(request: Request, num_tokens: int) -> ScheduledRequest:
    return ScheduledRequest(request, num_tokens, num_tokens == request.num_remaining)


def _is_prompt(entry: ScheduledRequest) -> bool:
    return entry.num_tokens > 1
