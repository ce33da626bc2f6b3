"""The loop of one rank: receive, schedule, agree with the other ranks, run the model, send tokens."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nibble.generation import FinishReason
from nibble.ipc.messages import AbortRequest, FlushCache, NewRequest, TokenBatch, TokenUpdate, ToRank, Wake
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner
from nibble.model_executor.sampler import SampledToken, Sampler
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.rank_statistics import RankStatistics
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import ScheduledRequest, Scheduler

logger = logging.getLogger(__name__)


class Inbox(Protocol):
    def receive(self, wait: bool) -> list[ToRank]:
        """All messages that have arrived; with `wait`, at least one."""
        ...


class EventLoop:
    def __init__(
        self,
        rank: int,
        scheduler: Scheduler,
        runner: ModelRunner,
        sampler: Sampler,
        dp_sync: DpSync,
        inbox: Inbox,
        send: Callable[[TokenBatch], None],
        statistics: RankStatistics | None = None,
    ) -> None:
        self.rank = rank
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.dp_sync = dp_sync
        self.inbox = inbox
        self.send = send
        self.statistics = statistics
        self.sequence = 0
        self.may_sleep = True

    def run_forever(self) -> None:
        while True:
            self.run_once()

    def run_once(self) -> None:
        """One step; sleeps first when no rank has anything to do."""
        known = self.sequence
        for message in self.inbox.receive(wait=self.may_sleep):
            self._handle(message)
        if self.may_sleep and self.sequence == known:
            return  # woken by an abort that came too late, of which the sleeping peers have not heard
        step = self.scheduler.schedule()
        pages = self.scheduler.take_dirty_pages()
        if pages:
            self.runner.pool.clear(pages)
        before = time.monotonic()
        num_tokens, num_logit_rows = sum(entry.num_tokens for entry in step), sum(entry.samples for entry in step)
        sync = self.dp_sync.exchange(num_tokens, num_logit_rows, num_tokens == len(step), self.sequence)
        if self.statistics is not None:
            self.statistics.count_step(step, sync, time.monotonic() - before)
        if sync.runs:
            batch = make_forward_batch(step)
            logits = self.runner.forward(batch, sync.global_num_tokens, sync.decodes_only, sync.global_num_logit_rows)
            if step:
                rows = [entry.request.sampling_row for entry in step if entry.samples]
                self._finish(step, self.sampler.sample(logits, rows) if rows else [])
        self.may_sleep = sync.may_sleep
        if self.statistics is not None:
            self.statistics.report(self.scheduler, sleeps=self.may_sleep)
        if self.may_sleep:
            self.scheduler.check_idle()

    def _handle(self, message: ToRank) -> None:
        match message:
            case NewRequest():
                self.scheduler.add(Request(message))
                self.sequence = message.sequence
                self._note_arrival(message)
            case Wake():
                self.sequence = message.sequence
            case AbortRequest():
                self.scheduler.abort(message.request_id)
                self._note_abort(message.request_id)
            case FlushCache():
                self.scheduler.flush_cache()

    def _note_arrival(self, message: NewRequest) -> None:
        fields = {"generation": message.request_id, "prompt_tokens": len(message.input_ids)}
        logger.debug("generation arrived", extra={"fields": fields})
        if self.statistics is not None:
            self.statistics.arrived(message.request_id)

    def _note_abort(self, request_id: str) -> None:
        logger.debug("generation aborted", extra={"fields": {"generation": request_id}})
        if self.statistics is not None:
            self.statistics.aborted(request_id)

    def _finish(self, step: Sequence[ScheduledRequest], sampled: Sequence[SampledToken]) -> None:
        requests = [entry.request for entry in step if entry.samples]
        reasons = self.scheduler.finish_step(step, [token.token_id for token in sampled])
        updates = [_update(*entry) for entry in zip(requests, sampled, reasons, strict=True)]
        news = [update for update in updates if update is not None]
        if news:
            self.send(TokenBatch(self.rank, news))


def make_forward_batch(step: Sequence[ScheduledRequest]) -> ForwardBatch | None:
    """The rows of a step, request after request; None without any."""
    if not step:
        return None
    input_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    for entry in step:
        start = entry.request.num_computed
        input_ids += entry.request.token_ids[start : start + entry.num_tokens]
        positions += range(start, start + entry.num_tokens)
        if entry.samples:
            logit_rows.append(len(input_ids) - 1)
    attention = AttentionBatch(
        query_lens=[entry.num_tokens for entry in step],
        seq_lens=[entry.request.num_computed + entry.num_tokens for entry in step],
        page_tables=[entry.request.pages for entry in step],
    )
    return ForwardBatch(input_ids, positions, attention, logit_rows)


def _update(request: Request, sampled: SampledToken, reason: FinishReason | None) -> TokenUpdate | None:
    """What is to be told of a request after a step, if anything."""
    if sampled.token_id is not None:
        request.unsent_ids.append(sampled.token_id)
    if sampled.logprob is not None:
        request.unsent_logprobs.append(sampled.logprob)
    if reason is not None:
        fields = {"generation": request.request_id, "finish_reason": reason.type, "tokens": request.num_generated}
        logger.debug("generation finished", extra={"fields": fields})
    elif len(request.unsent_ids) < request.update_interval and request.num_generated > 1:
        return None  # the first token is always told, since clients and metrics measure the time to it
    update = TokenUpdate(request.request_id, request.unsent_ids, reason, request.unsent_logprobs, request.cached_tokens)
    request.unsent_ids, request.unsent_logprobs = [], []
    return update
