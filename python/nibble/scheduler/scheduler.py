"""Requests of one rank, from arrival to last token. Knows no sockets and no tensors."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from nibble.generation import FinishReason
from nibble.scheduler.kv_pages import KvPages
from nibble.scheduler.policy import RequestView, Snapshot, plan_step
from nibble.scheduler.request import Request


class ScheduledRequest(NamedTuple):
    """`num_tokens` of the request's next tokens go through the model in this step."""

    request: Request
    num_tokens: int
    samples: bool
    """Whether the step reaches the request's last token, so that a new one is sampled."""


@dataclass(frozen=True)
class SchedulerLimits:
    page_size: int
    chunked_prefill_size: int
    max_running_requests: int
    context_length: int
    eos_token_ids: frozenset[int]
    reuse_prefixes: bool = True


class Scheduler:
    """Decides what each step processes and keeps the books of requests; those of KV pages are `kv`."""

    def __init__(self, limits: SchedulerLimits, num_pages: int) -> None:
        self.limits = limits
        self.kv = KvPages(num_pages, limits.page_size, limits.reuse_prefixes)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_retracted = 0

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        self.kv.prepare(request)
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Forgets a request; an unknown one has finished already."""
        for queue in (self.running, self.waiting):
            for request in queue:
                if request.request_id == request_id:
                    queue.remove(request)
                    self.kv.release(request)
                    return

    def schedule(self) -> list[ScheduledRequest]:
        """The next step, decoding requests first, with pages allocated. Empty when there is nothing to do."""
        plan = plan_step(self._snapshot(self._candidates()))
        while plan.retracts:
            self._retract_youngest()
            plan = plan_step(self._snapshot(waiting=()))
        step = [_scheduled(self.running[index], tokens) for index, tokens in plan.running]
        for tokens in plan.admitted:
            request = self.waiting.popleft()
            self.kv.admit(request)
            self.running.append(request)
            step.append(_scheduled(request, tokens))
        # Only now: the prefixes of all admitted requests are held, and what is evicted is nobody's.
        for entry in step:
            self.kv.grow(entry.request, entry.num_tokens)
        return sorted(step, key=lambda entry: entry.num_tokens > 1)

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

    def _candidates(self) -> list[RequestView]:
        """The waiting requests that may be admitted: as many as there are slots and prompt tokens for in a step."""
        views: list[RequestView] = []
        budget = self.limits.chunked_prefill_size
        for request in islice(self.waiting, self.limits.max_running_requests - len(self.running)):
            if budget <= 0:
                break
            match = self.kv.match(request)
            computed = match.pages * self.limits.page_size
            views.append(RequestView(computed, len(request.token_ids) - computed, match.locked_pages))
            budget -= views[-1].remaining
        return views

    def _snapshot(self, waiting: Sequence[RequestView]) -> Snapshot:
        return Snapshot(
            running=[_view(request) for request in self.running],
            waiting=waiting,
            available_pages=self.kv.num_available,
            page_size=self.limits.page_size,
            prefill_budget=self.limits.chunked_prefill_size,
            max_running=self.limits.max_running_requests,
        )

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

    def _retract_youngest(self) -> None:
        request = self.running.pop()
        self.kv.release(request)
        self.kv.prepare(request)
        self.waiting.appendleft(request)
        self.num_retracted += 1


def _scheduled(request: Request, num_tokens: int) -> ScheduledRequest:
    return ScheduledRequest(request, num_tokens, num_tokens == request.num_remaining)


def _view(request: Request) -> RequestView:
    return RequestView(request.num_computed, request.num_remaining, len(request.pages))
