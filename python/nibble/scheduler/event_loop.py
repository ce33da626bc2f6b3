"""The loop of one rank: receive, schedule, agree with the other ranks, run the model, send tokens."""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

import msgspec

from nibble.generation import FinishReason
from nibble.ipc.messages import (
    AbortRequest,
    CompileGrammar,
    FlushCache,
    ForgetGrammar,
    NewRequest,
    StartProfile,
    StopProfile,
    TokenBatch,
    TokenUpdate,
    ToRank,
    Wake,
)
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch, ScoredToken
from nibble.model_executor.future_tokens import future_token
from nibble.model_executor.sampler import SampledToken
from nibble.model_executor.step_executor import StepExecutor, UnknownTokens
from nibble.observability.rank_profiler import RankProfiler
from nibble.scheduler.dp_sync import DpSync, DpSyncResult
from nibble.scheduler.prefill_delayer import RankReport
from nibble.scheduler.prompt_scores import PromptScores
from nibble.scheduler.rank_statistics import RankStatistics
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import PENDING, ScheduledRequest, Scheduler
from nibble.structured_output.store import GrammarStore

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
        executor: StepExecutor,
        dp_sync: DpSync,
        inbox: Inbox,
        send: Callable[[TokenBatch], None],
        grammars: GrammarStore,
        statistics: RankStatistics | None = None,
        overlaps: bool = False,
        stream_period: float = 0.0,
        profiler: RankProfiler | None = None,
    ) -> None:
        """With `overlaps` a step is prepared and launched while the one before it still runs.

        `stream_period`: seconds between two updates of requests that go on, so that quick steps share one.
        """
        self.rank = rank
        self.scheduler = scheduler
        self.executor = executor
        self.dp_sync = dp_sync
        self.inbox = inbox
        self.send = send
        self.grammars = grammars
        self.statistics = statistics
        self.overlaps = overlaps
        self.stream_period = stream_period
        self._updated_at = 0.0
        self.profiler = profiler
        self.sequence = 0
        self.may_sleep = True
        self.may_admit = True
        self._step_began = 0.0
        self._unfinished: UnfinishedStep | None = None
        """The last step, where its tokens are not known yet."""

    def run_forever(self, on_step: Callable[[], None] = lambda: None) -> None:
        while True:
            self.run_once()
            on_step()

    def run_once(self) -> None:
        """One step; sleeps first when no rank has anything to do."""
        known = self.sequence
        for message in self.inbox.receive(wait=self.may_sleep):
            self._handle(message)
        if self.may_sleep and self.sequence == known:
            return  # woken by an abort that came too late, of which the sleeping peers have not heard
        step = self._schedule()
        to_score = [entry for entry in step if not entry.request.prompt_scores.is_complete]
        pages = self.scheduler.take_dirty_pages()
        if pages:
            self.executor.clear_pages(pages)
        before = time.monotonic()
        sync = self.dp_sync.exchange(self._report(step, to_score, before))
        self.may_admit = sync.may_admit_next
        if self.statistics is not None:
            self.statistics.count_step(step, sync, time.monotonic() - before)
        last, self._unfinished = self._unfinished, self._launch(step, to_score, sync) if sync.runs else None
        if last is not None:
            self._finish(last)
        if not self.overlaps:
            self._finish_unfinished()
        if self.profiler is not None and sync.runs:
            self.profiler.step()
        self.may_sleep = sync.may_sleep
        if self.statistics is not None:
            self.statistics.report(self.scheduler, sleeps=self.may_sleep)
        if self.may_sleep:
            self.scheduler.check_idle()

    def _schedule(self) -> list[ScheduledRequest]:
        if self._unfinished is not None and self._unfinished.must_be_finished_first:
            self._finish_unfinished()
        step = self.scheduler.schedule(self.may_admit)
        if step is None:
            self._finish_unfinished()
            step = self.scheduler.schedule(self.may_admit)
            assert step is not None
        return step

    def _launch(
        self, step: Sequence[ScheduledRequest], to_score: Sequence[ScheduledRequest], sync: DpSyncResult
    ) -> "UnfinishedStep":
        sampling = [entry.request for entry in step if entry.samples]
        tokens = self.executor.launch(
            make_forward_batch(step, is_scored=bool(to_score)),
            [request.sampling_row for request in sampling],
            [request.slot for request in sampling],
            sync.global_num_tokens,
            sync.decodes_only,
            sync.global_num_logit_rows,
        )
        self.scheduler.begin_step(step)
        scored = [
            (entry.request.prompt_scores, entry.request.prompt_scores.begin(entry.start, entry.num_tokens))
            for entry in to_score
        ]
        return UnfinishedStep(step, tokens, scored)

    def _finish_unfinished(self) -> None:
        if self._unfinished is not None:
            last, self._unfinished = self._unfinished, None
            self._finish(last)

    def _report(self, step: Sequence[ScheduledRequest], to_score: Sequence[ScheduledRequest], now: float) -> RankReport:
        num_tokens = sum([entry.num_tokens for entry in step])
        step_us = 0 if self.may_sleep else int((now - self._step_began) * 1e6)
        self._step_began = now
        return RankReport(
            num_tokens=num_tokens,
            num_logit_rows=sum([entry.samples for entry in step]) + sum(map(_num_scored, to_score)),
            decodes_only=num_tokens == len(step),
            prompt_steps=self.scheduler.prompt_steps,
            num_ready=self.scheduler.num_ready,
            is_busy=self._unfinished is not None or not self.scheduler.is_idle,
            sequence=self.sequence,
            step_us=step_us,
        )

    def _handle(self, message: ToRank) -> None:
        match message:
            case NewRequest():
                request = self._new_request(message)
                self.scheduler.add(request)
                self.sequence = message.sequence
                self._note_arrival(request)
            case Wake():
                self.sequence = message.sequence
            case AbortRequest():
                self.scheduler.abort(message.request_id)
                self._note_abort(message.request_id)
            case FlushCache():
                self.scheduler.flush_cache()
            case CompileGrammar(key, structural_tag):
                self.grammars.compile(key, structural_tag)
            case ForgetGrammar(key):
                self.grammars.forget(key)
            case StartProfile() if self.profiler is not None:
                self.profiler.start(**msgspec.structs.asdict(message))
            case StopProfile() if self.profiler is not None:
                self.profiler.stop()

    def _new_request(self, message: NewRequest) -> Request:
        grammar = message.sampling.grammar
        return Request(message, None if grammar is None else self.grammars.begin(grammar))

    def _note_arrival(self, request: Request) -> None:
        fields = {**request.log_fields, "prompt_tokens": request.prompt_length}
        logger.debug("generation arrived", extra={"fields": fields})
        if self.statistics is not None:
            self.statistics.arrived(request.request_id)

    def _note_abort(self, request_id: str) -> None:
        logger.debug("generation aborted", extra={"fields": {"generation": request_id}})
        if self.statistics is not None:
            self.statistics.aborted(request_id)

    def _finish(self, unfinished: "UnfinishedStep") -> None:
        """Waits for the tokens of a step, books them and tells what there is to tell."""
        sampled = unfinished.tokens.wait()
        if unfinished.scored:
            logprobs = iter(unfinished.tokens.prompt_logprobs())
            for scores, count in unfinished.scored:
                scores.take(islice(logprobs, count))
        booked = self.scheduler.finish_step(unfinished.step, [token.token_id for token in sampled])
        is_due = self._is_update_due()
        updates = [_update(request, sampled[row], reason, is_due) for row, request, reason in booked]
        news = [update for update in updates if update is not None]
        if news:
            self.send(TokenBatch(self.rank, news))

    def _is_update_due(self) -> bool:
        now = time.monotonic()
        is_due = now - self._updated_at >= self.stream_period
        if is_due:
            self._updated_at = now
        return is_due


class UnfinishedStep(NamedTuple):
    """A step that the model has been given, and what will be sampled in it."""

    step: Sequence[ScheduledRequest]
    tokens: UnknownTokens
    scored: Sequence[tuple[PromptScores, int]]
    """How many tokens of which prompts are scored."""

    @property
    def must_be_finished_first(self) -> bool:
        """Whether the next step can't be prepared without its tokens."""
        return any(entry.samples and entry.request.needs_last_token for entry in self.step)


def _num_scored(entry: ScheduledRequest) -> int:
    return len(entry.request.prompt_scores.positions(entry.start, entry.num_tokens))


def make_forward_batch(step: Sequence[ScheduledRequest], is_scored: bool) -> ForwardBatch | None:
    """The rows of a step, request after request; None without any. `is_scored` if tokens of prompts are."""
    if not step:
        return None
    if step[-1].num_tokens == 1 and not is_scored:  # requests with several rows come last
        return _one_row_each(step)
    input_ids: list[int] = []
    positions: list[int] = []
    logit_rows: list[int] = []
    scored: list[ScoredToken] = []
    for entry in step:
        request, start, num_tokens, samples = entry
        if num_tokens == 1:
            token = request.token_ids[start]
            input_ids.append(future_token(request.slot) if token == PENDING else token)
        else:
            input_ids += request.token_ids[start : start + num_tokens]
        positions += range(start, start + num_tokens)
        scores = request.prompt_scores
        if not scores.is_complete:
            first_row = len(input_ids) - num_tokens
            for position in scores.positions(start, num_tokens):
                scored.append(ScoredToken(len(logit_rows), request.token_ids[position + 1], scores.wanted))
                logit_rows.append(first_row + position - start)
        if samples:
            logit_rows.append(len(input_ids) - 1)
    attention = AttentionBatch(
        query_lens=[entry.num_tokens for entry in step],
        seq_lens=[entry.start + entry.num_tokens for entry in step],
        page_tables=[entry.request.pages for entry in step],
    )
    return ForwardBatch(input_ids, positions, attention, logit_rows, scored)


def _one_row_each(step: Sequence[ScheduledRequest]) -> ForwardBatch:
    tokens = [entry.request.token_ids[entry.start] for entry in step]
    if PENDING in tokens:
        tokens = [
            future_token(entry.request.slot) if token == PENDING else token
            for entry, token in zip(step, tokens, strict=True)
        ]
    positions = [entry.start for entry in step]
    attention = AttentionBatch(
        query_lens=[1] * len(step),
        seq_lens=[position + 1 for position in positions],
        page_tables=[entry.request.pages for entry in step],
    )
    return ForwardBatch(tokens, positions, attention, [row for row, entry in enumerate(step) if entry.samples])


def _update(request: Request, sampled: SampledToken, reason: FinishReason | None, is_due: bool) -> TokenUpdate | None:
    """What is to be told of a request after a step, if anything; `is_due` unless others were told just now."""
    if request.num_generated and sampled.token_id is not None:
        request.unsent_ids.append(sampled.token_id)
        if sampled.logprob is not None:
            request.unsent_logprobs.append(sampled.logprob)
    if reason is not None:
        fields = {**request.log_fields, "finish_reason": reason.type, "tokens": request.num_generated}
        logger.debug("generation finished", extra={"fields": fields})
    elif request.has_told and not (is_due and len(request.unsent_ids) >= request.update_interval):
        return None  # the first token is always told, since clients and metrics measure the time to it
    request.has_told = True
    update = TokenUpdate(
        request.request_id,
        request.unsent_ids,
        reason,
        tuple(request.unsent_logprobs),
        request.cached_tokens,
        request.prompt_scores.hand_over(),
    )
    request.unsent_ids, request.unsent_logprobs = [], []
    return update
