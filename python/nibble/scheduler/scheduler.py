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

PENDING = -1
"""In the place of a token that has been sampled, or will be, and that the host does not know yet."""

MAX_SCORED_TOKENS = 512
"""In one step, of prompts whose log-probabilities are wanted. A row of logits may take more than half a megabyte."""


class ScheduledRequest(NamedTuple):
    """`num_tokens` of the request's tokens go through the model in this step, from `start` on."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    """Whether the step reaches the request's last token, so that a new one is sampled."""


class BookedToken(NamedTuple):
    """The `row`-th of the tokens that a step sampled, and how it ended the request, if it did."""

    row: int
    request: Request
    reason: FinishReason | None


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
    """Decides what each step processes and keeps the books of requests; those of KV pages are `kv`.

    A step is scheduled, begun when it is handed to the model, and finished when its tokens are known. The next one may
    be scheduled and begun before the last is finished: it goes on with tokens that only the device knows. A request
    that turns out to have ended is then in one step too many, and leaves when that one is finished, its token unused.
    """

    def __init__(self, limits: SchedulerLimits, num_pages: int) -> None:
        self.limits = limits
        self.kv = KvPages(num_pages, limits.page_size, limits.reuse_prefixes)
        self.waiting = WaitingQueue(limits.max_overtakes)
        self.running: list[Request] = []
        """By precedence, then oldest first."""
        self._free_slots = list(range(limits.max_running_requests))
        self.num_retracted = 0
        self.num_ready = 0
        """Waiting requests that the last step admitted, or would have, had it been allowed to."""
        self.prompt_steps = 0
        """How many steps the prompts take that go on behind the last one."""

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
                    self._end(request)
                    return

    def schedule(self, may_admit: bool = True) -> list[ScheduledRequest] | None:
        """The next step, decoding requests first, with pages allocated. Empty when there is nothing to do.

        Unless it `may_admit`, no waiting request joins those that run. None when a request must be retracted whose
        newest token is not known: the steps that have begun must be finished first.
        """
        candidates = self._candidates()
        plan, decoding, prompts = self._plan(candidates)
        while plan.retracts:
            if self.running[-1].num_in_flight:
                return None
            self._retract_last()
            candidates = []
            plan, decoding, prompts = self._plan(candidates)
        self.num_ready = len(plan.admitted)
        step = [ScheduledRequest(request, request.num_computed, 1, True) for request in decoding]
        step += [_scheduled(request, tokens) for request, tokens in zip(prompts, plan.prompts, strict=True) if tokens]
        if may_admit:
            admitted = [self._admit(request, num) for (request, _), num in zip(candidates, plan.admitted, strict=False)]
            prompts += [entry.request for entry in admitted]
            step += admitted
        # Only now: the prefixes of all admitted requests are held, and what is evicted is nobody's.
        for request, start, num_tokens, _ in step:
            if num_tokens > 1 or start % self.limits.page_size == 0:
                self.kv.grow(request, num_tokens)
        unread = sum(r.num_remaining for r in prompts) - sum(entry.num_tokens for entry in step) + len(decoding)
        self.prompt_steps = -(-unread // self.limits.chunked_prefill_size)
        return sorted(step, key=_is_prompt)

    def begin_step(self, step: Sequence[ScheduledRequest]) -> None:
        """The model has been given the step."""
        for request, _, num_tokens, samples in step:
            request.num_in_flight += 1
            request.num_computed += num_tokens
            if samples:
                request.token_ids.append(PENDING)

    def finish_step(self, step: Sequence[ScheduledRequest], tokens: Sequence[int | None]) -> list[BookedToken]:
        """Books the oldest step that has begun. `tokens` has one entry for each request of the step that samples, None
        for a failed row. Those of requests that have ended in the meantime are not booked.
        """
        for entry in step:
            entry.request.num_in_flight -= 1
        sampling = [entry for entry in step if entry.samples]
        booked: list[BookedToken] = []
        for row, (entry, token) in enumerate(zip(sampling, tokens, strict=True)):
            entry.request.kv_is_finite = token is not None
            if not entry.request.has_ended:
                booked.append(self._book_token(row, entry, token))
        if any(token.reason for token in booked):
            self.running = [request for request in self.running if not request.has_ended]
        for request, _, _, samples in step:
            if not samples:
                request.kv_is_finite = False  # until the logits after the last computed token say so
            if request.has_ended:
                self._release_if_landed(request)
        return booked

    def take_dirty_pages(self) -> list[int]:
        """Freed pages that may hold NaN, to be cleared before the next step."""
        return self.kv.take_dirty()

    def flush_cache(self) -> None:
        """Forgets the cached prefixes of all requests that have ended."""
        self.kv.flush()

    def check_idle(self) -> None:
        """Raises RuntimeError when pages or slots are in use though no request is."""
        if self.is_idle:
            self.kv.check_idle()
            used = self.limits.max_running_requests - len(self._free_slots)
            if used:
                raise RuntimeError(f"{used} request slots leaked")

    def _candidates(self) -> list[tuple[Request, RequestView]]:
        """The waiting requests that may be admitted, in the order of their turns."""
        if not self._free_slots or not self.waiting:
            return []
        if self.limits.policy == "fcfs":
            return list(self._within_budget(self.waiting.head(len(self._free_slots))))
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
            if request.num_remaining > 1:
                prompts.append(request)
            elif not request.num_in_flight or not request.is_at_its_limit(self.limits.context_length):
                decoding.append(request)
        page_size = self.limits.page_size
        plan = plan_step(
            Snapshot(
                num_running=len(self.running),
                decode_pages=sum(request.num_computed % page_size == 0 for request in decoding),
                prompts=[RequestView(r.num_computed, r.num_remaining, len(r.pages)) for r in prompts],
                waiting=[view for _, view in candidates],
                available_pages=self.kv.num_available,
                page_size=page_size,
                prefill_budget=self._prefill_budget([*prompts, *(request for request, _ in candidates)]),
                max_running=len(self.running) + len(self._free_slots),
            )
        )
        return plan, decoding, prompts

    def _prefill_budget(self, prompts: Iterable[Request]) -> int:
        """Prompt tokens of a step: not many where they are scored, since each takes a row of logits then."""
        budget = self.limits.chunked_prefill_size
        return (
            budget if all(request.prompt_scores.is_complete for request in prompts) else min(budget, MAX_SCORED_TOKENS)
        )

    def _admit(self, request: Request, num_tokens: int) -> ScheduledRequest:
        request.precedence = math.inf if self.waiting.is_overdue(request) else request.priority
        self.waiting.remove(request.request_id)
        request.slot = self._free_slots.pop()
        self.kv.admit(request)
        bisect.insort(self.running, request, key=lambda running: (-running.precedence, running.arrival))
        return _scheduled(request, num_tokens)

    def _book_token(self, row: int, entry: ScheduledRequest, token: int | None) -> BookedToken:
        """Puts a token, None for a failed row, in the place of its placeholder."""
        request, place = entry.request, entry.start + entry.num_tokens
        if token is None:
            del request.token_ids[place:]
            reason: FinishReason | None = FinishReason(
                "abort", message="the model produced numbers that are not finite for this request"
            )
        else:
            reason = request.take(place, token, self.limits.eos_token_ids, self.limits.context_length)
        if reason is not None:
            request.has_ended = True
        elif entry.num_tokens > 1 or place == request.prompt_length:
            self.kv.share(request, place)  # a prompt is complete
        return BookedToken(row, request, reason)

    def _end(self, request: Request) -> None:
        request.has_ended = True
        self._release_if_landed(request)

    def _release_if_landed(self, request: Request) -> None:
        """Takes back pages and slot of a request that has ended, once no step that uses them is under way."""
        if request.num_in_flight == 0:
            self._release(request)

    def _release(self, request: Request) -> None:
        self.kv.release(request)
        self._free_slots.append(request.slot)

    def _retract_last(self) -> None:
        request = self.running.pop()
        self._release(request)
        self.kv.prepare(request)
        self.waiting.put_back(request)
        self.num_retracted += 1


def _scheduled(request: Request, num_tokens: int) -> ScheduledRequest:
    return ScheduledRequest(request, request.num_computed, num_tokens, num_tokens == request.num_remaining)


def _is_prompt(entry: ScheduledRequest) -> bool:
    return entry.num_tokens > 1
