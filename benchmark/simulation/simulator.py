"""Ranks that step together, with the engine's own scheduler, load balancer and prefill delayer, on a simulated clock.

Only the model is replaced, by what a step costs. Every rank computes its rows, and since all meet in the gather of
every MoE layer, the step takes as long as the slowest one; the rest is waiting.
"""

import itertools
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "python"))

from nibble.controller.load_balancer import Booking, LoadBalancer
from nibble.controller.prefix_record import PrefixRecord
from nibble.ipc.messages import NewRequest
from nibble.sampling_params import SamplingParams
from nibble.scheduler.prefill_delayer import DelayLimits, PrefillDelayer, RankReport
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import ScheduledRequest, Scheduler, SchedulerLimits

PAGE_SIZE = 16
MAX_PREFIX_BLOCKS = 1 << 18


@dataclass(frozen=True)
class CostModel:
    """Milliseconds. A rank's part of a step is linear in its rows; the gather is linear in the rows of all ranks."""

    step: float
    """Of a rank that has rows: weights are read once, whatever their number."""
    prefill_token: float
    decode_row: float
    gather: float = 0.0
    gather_row: float = 0.0
    cores: int | None = None
    """Where ranks share so many cores, they take turns."""

    def rank_ms(self, prefill_tokens: int, decode_rows: int) -> float:
        if not prefill_tokens and not decode_rows:
            return 0.0
        return self.step + self.prefill_token * prefill_tokens + self.decode_row * decode_rows

    def step_ms(self, rank_ms: Sequence[float], rows: int) -> float:
        slowest = max(rank_ms)
        if self.cores is not None:
            slowest = max(slowest, sum(rank_ms) / self.cores)
        return slowest + self.gather + self.gather_row * rows


@dataclass(frozen=True)
class Arrival:
    ms: float
    input_ids: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Settings:
    ranks: int
    method: str = "total_tokens"
    delay: DelayLimits | None = None
    chunked_prefill_size: int = 2048
    max_running_requests: int = 64
    cache_tokens: int = 1 << 18
    """Of one rank."""


@dataclass
class Result:
    """What happened. Times in milliseconds."""

    elapsed: float = 0.0
    computing: float = 0.0
    """Of all ranks together."""
    num_ranks: int = 1
    generated: int = 0
    computed: int = 0
    first_token: list[float] = field(default_factory=list)
    inter_token: list[float] = field(default_factory=list)

    @property
    def waiting_share(self) -> float:
        """The part of the ranks' time in steps that they spend waiting for each other."""
        return 1 - self.computing / (self.elapsed * self.num_ranks)

    @property
    def tokens_per_second(self) -> float:
        return self.generated / self.elapsed * 1000


def workload(
    seed: int,
    count: int,
    arrivals_per_second: float,
    prompt_tokens: float,
    new_tokens: float,
    num_prefixes: int = 0,
    prefix_tokens: int = 0,
) -> list[Arrival]:
    """Poisson arrivals; lengths are log-normal around the given medians. With `num_prefixes` every prompt begins with
    one of so many common beginnings.
    """
    generator = random.Random(seed)
    beginnings = [[generator.getrandbits(30) for _ in range(prefix_tokens)] for _ in range(num_prefixes)]
    arrivals, now = [], 0.0
    for _ in range(count):
        now += generator.expovariate(arrivals_per_second) * 1000
        length = max(1, int(generator.lognormvariate(0, 0.8) * prompt_tokens))
        beginning = generator.choice(beginnings) if beginnings else []
        own = [generator.getrandbits(30) for _ in range(length)]
        arrivals.append(Arrival(now, [*beginning, *own], max(1, int(generator.lognormvariate(0, 0.6) * new_tokens))))
    return arrivals


@dataclass
class _Running:
    request: Request
    booking: Booking
    arrived: float
    last_token: float | None = None


class Simulation:
    def __init__(self, settings: Settings, cost: CostModel, arrivals: Sequence[Arrival]) -> None:
        self.settings, self.cost, self.arrivals = settings, cost, arrivals
        limits = SchedulerLimits(
            PAGE_SIZE, settings.chunked_prefill_size, settings.max_running_requests, 1 << 30, frozenset()
        )
        self.schedulers = [Scheduler(limits, settings.cache_tokens // PAGE_SIZE) for _ in range(settings.ranks)]
        prefixes = PrefixRecord(2 * PAGE_SIZE, MAX_PREFIX_BLOCKS)
        self.balancer = LoadBalancer(settings.ranks, settings.method, prefixes)
        self.delayer = PrefillDelayer(settings.ranks, settings.delay) if settings.delay else None
        self.may_admit = True
        self._names = itertools.count()
        self.requests: dict[str, _Running] = {}
        self.now = 0.0
        self.last_us = 0
        self.result = Result(num_ranks=settings.ranks)

    def run(self, to_the_end: bool = False) -> Result:
        """Until the last request has come, while the load is what it was meant to be, or until all have ended."""
        upcoming = list(reversed(self.arrivals))
        while upcoming or (to_the_end and self.requests):
            if not self.requests:
                self.now, self.last_us = max(self.now, upcoming[-1].ms), 0
            while upcoming and upcoming[-1].ms <= self.now:
                self._arrive(upcoming.pop())
            self._step()
        return self.result

    def _arrive(self, arrival: Arrival) -> None:
        name = str(next(self._names))
        sampling = SamplingParams(max_new_tokens=arrival.new_tokens, ignore_eos=True)
        request = Request(NewRequest(0, name, arrival.input_ids, sampling, 0, False, 0, 1, 0))
        booking = self.balancer.book(arrival.input_ids, arrival.new_tokens, None)
        self.requests[name] = _Running(request, booking, arrival.ms)
        self.schedulers[booking.rank].add(request)

    def _step(self) -> None:
        steps = []
        for scheduler in self.schedulers:
            step = scheduler.schedule(self.may_admit)
            assert step is not None, "every step has been finished"
            steps.append(step)
        if self.delayer:
            reports = [self._report(*entry) for entry in zip(self.schedulers, steps, strict=True)]
            self.may_admit = self.delayer.may_admit_next(reports)
        rank_ms = [self._rank_ms(step) for step in steps]
        rows = sum(entry.num_tokens for step in steps for entry in step)
        step_ms = self.cost.step_ms(rank_ms, rows) if rows else 0.0
        self.now += step_ms
        self.last_us = int(step_ms * 1000)
        self.result.elapsed += step_ms
        self.result.computing += sum(rank_ms)
        self.result.computed += rows
        for scheduler, step in zip(self.schedulers, steps, strict=True):
            self._finish(scheduler, step)

    def _report(self, scheduler: Scheduler, step: Sequence[ScheduledRequest]) -> RankReport:
        rows = sum(entry.num_tokens for entry in step)
        return RankReport(
            num_tokens=rows,
            num_logit_rows=sum(entry.samples for entry in step),
            decodes_only=rows == len(step),
            prompt_steps=scheduler.prompt_steps,
            num_ready=scheduler.num_ready,
            is_busy=not scheduler.is_idle,
            sequence=0,
            step_us=self.last_us,
        )

    def _rank_ms(self, step: Sequence[ScheduledRequest]) -> float:
        prefill = sum(entry.num_tokens for entry in step if entry.num_tokens > 1)
        return self.cost.rank_ms(prefill, sum(entry.num_tokens == 1 for entry in step))

    def _finish(self, scheduler: Scheduler, step: Sequence[ScheduledRequest]) -> None:
        scheduler.begin_step(step)
        for _, request, reason in scheduler.finish_step(step, [7] * sum(entry.samples for entry in step)):
            running = self.requests[request.request_id]
            self.balancer.progress(running.booking, 1)
            if running.last_token is None:
                self.result.first_token.append(self.now - running.arrived)
            else:
                self.result.inter_token.append(self.now - running.last_token)
            running.last_token = self.now
            self.result.generated += 1
            if reason is not None:
                self.balancer.release(running.booking)
                del self.requests[request.request_id]


def percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
