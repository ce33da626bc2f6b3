"""Requests of one rank, from arrival to last token. Knows no sockets and no tensors."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from nibble.generation import FinishReason
from nibble.kv_cache.allocator import PageAllocator
from nibble.scheduler.policy import RequestView, Snapshot, pages_for, plan_step
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


class Scheduler:
    """Decides what each step processes and keeps the books of requests and KV pages."""

    def __init__(self, limits: SchedulerLimits, num_pages: int) -> None:
        self.limits = limits
        self.allocator = PageAllocator(num_pages)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # oldest first
        self.num_retracted = 0
        self._dirty_pages: list[int] = []

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Forgets a request and frees its pages; an unknown one has finished already."""
        for queue in (self.running, self.waiting):
            for request in queue:
                if request.request_id == request_id:
                    queue.remove(request)
                    self._release(request, finite=False)
                    return

    def schedule(self) -> list[ScheduledRequest]:
        """The next step, decoding requests first, with pages allocated. Empty when there is nothing to do."""
        free_slots = self.limits.max_running_requests - len(self.running)
        plan = plan_step(
            Snapshot(
                running=[_view(request) for request in self.running],
                waiting=[_view(request) for request in islice(self.waiting, free_slots)],
                free_pages=self.allocator.num_free,
                page_size=self.limits.page_size,
                prefill_budget=self.limits.chunked_prefill_size,
                max_running=self.limits.max_running_requests,
            )
        )
        step = [_scheduled(self.running[index], tokens) for index, tokens in plan.running]
        for index in plan.retracted:
            self._retract(self.running[index])
        for tokens in plan.admitted:
            request = self.waiting.popleft()
            self.running.append(request)
            step.append(_scheduled(request, tokens))
        for entry in step:
            self._allocate(entry)
        return sorted(step, key=lambda entry: entry.num_tokens > 1)

    def finish_step(self, step: Sequence[ScheduledRequest], tokens: Sequence[int | None]) -> list[FinishReason | None]:
        """Books a step. `tokens` has one entry per request of the step that samples, None for a failed row.

        Returns, for each of those, how the request ended, or None if it goes on.
        """
        sampling = [entry.request for entry in step if entry.samples]
        for entry in step:
            entry.request.num_computed += entry.num_tokens
        reasons = [self._book_token(request, token) for request, token in zip(sampling, tokens, strict=True)]
        ended = {id(request) for request, reason in zip(sampling, reasons, strict=True) if reason}
        if ended:
            self.running = [request for request in self.running if id(request) not in ended]
        return reasons

    def take_dirty_pages(self) -> list[int]:
        """Freed pages that may hold NaN, to be cleared before the next step: those of requests that ended early.

        Where the last token's logits were finite, every key and value before it was.
        """
        pages, self._dirty_pages = self._dirty_pages, []
        return pages

    def check_idle(self) -> None:
        """Raises RuntimeError when pages are in use though no request is."""
        if self.is_idle and self.allocator.num_used:
            raise RuntimeError(f"{self.allocator.num_used} KV pages leaked")

    def _book_token(self, request: Request, token: int | None) -> FinishReason | None:
        if token is None:
            reason: FinishReason | None = FinishReason(
                "abort", message="the model produced numbers that are not finite for this request"
            )
        else:
            reason = request.append(token, self.limits.eos_token_ids, self.limits.context_length)
        if reason is not None:
            self._release(request, finite=token is not None)
        return reason

    def _allocate(self, entry: ScheduledRequest) -> None:
        request = entry.request
        needed = pages_for(request.num_computed + entry.num_tokens, self.limits.page_size)
        request.pages += self.allocator.allocate(needed - len(request.pages))

    def _retract(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request, finite=False)
        self.waiting.appendleft(request)
        self.num_retracted += 1

    def _release(self, request: Request, finite: bool) -> None:
        if not finite:
            self._dirty_pages += request.pages
        self.allocator.free(request.pages)
        request.pages = []
        request.num_computed = 0


def _scheduled(request: Request, num_tokens: int) -> ScheduledRequest:
    return ScheduledRequest(request, num_tokens, num_tokens == request.num_remaining)


def _view(request: Request) -> RequestView:
    return RequestView(request.num_computed, request.num_remaining, len(request.pages))
