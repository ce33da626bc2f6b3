"""Counts what a rank does, for the metrics, and reports it now and then."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nibble.config.resolve import DTYPE_BYTES, EngineConfig
from nibble.kernels.torch.fp8_row import Fp8RowLayout
from nibble.layers.moe.fused_moe import FusedMoE
from nibble.layers.moe.token_dispatcher import Fp4AllGatherDispatcher
from nibble.observability.rank_stats import NUM_ROW_BUCKETS, RankStats, row_bucket
from nibble.scheduler.dp_sync import DpSyncResult
from nibble.scheduler.scheduler import ScheduledRequest, Scheduler

REPORT_INTERVAL = 1.0
"""Seconds."""


@dataclass(frozen=True)
class MoeTraffic:
    """Bytes that one row costs in all MoE layers of a step, for each rank that it travels to or from."""

    dispatch: int = 0
    combine: int = 0


def moe_traffic(config: EngineConfig, layers: Iterable[object]) -> MoeTraffic:
    """What the MoE layers among `layers` move: wire rows, or rows as they are with ids (int32) and weights (fp32); and
    back, results as they are, or FP8 rows.
    """
    moe_layers = [layer for layer in layers if isinstance(layer, FusedMoE)]
    hidden_bytes = config.model.hidden_size * DTYPE_BYTES[config.dtype]
    dispatch = sum(
        layer.dispatcher.layout.row_bytes
        if isinstance(layer.dispatcher, Fp4AllGatherDispatcher)
        else hidden_bytes + 8 * layer.top_k
        for layer in moe_layers
    )
    fp8 = config.args.moe_combine_dtype == "fp8"
    combine = Fp8RowLayout(config.model.hidden_size).row_bytes if fp8 else hidden_bytes
    return MoeTraffic(dispatch, combine * len(moe_layers))


class RankStatistics:
    """Adds up every step; `send` gets a report at most once a second, and a last one before the rank sleeps."""

    def __init__(
        self,
        rank: int,
        traffic: MoeTraffic,
        send: Callable[[RankStats], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank = rank
        self._traffic = traffic
        self._send = send
        self._clock = clock
        self._reported_at = clock()
        self._sampled = 0  # since the last report
        self._arrivals: dict[str, float] = {}  # of requests that have not been in a step
        self._queue_seconds: list[float] = []
        self._num_rows = 0
        self._steps_by_rows = [0] * NUM_ROW_BUCKETS
        self._dispatched_bytes = 0
        self._combined_bytes = 0
        self._dp_sync_seconds = 0.0

    def arrived(self, request_id: str) -> None:
        """A request came; until it takes part in a step, or is aborted, it waits."""
        self._arrivals[request_id] = self._clock()

    def aborted(self, request_id: str) -> None:
        self._arrivals.pop(request_id, None)

    def count_step(self, step: Sequence[ScheduledRequest], sync: DpSyncResult, sync_seconds: float) -> None:
        """`sync_seconds`: how long the exchange of row counts took."""
        self._dp_sync_seconds += sync_seconds
        if not sync.runs:
            return
        sizes = sync.global_num_tokens  # of this rank alone where attention groups never meet
        rows, peers = sum(entry.num_tokens for entry in step), len(sizes) - 1
        self._num_rows += rows
        self._steps_by_rows[row_bucket(rows)] += 1
        self._dispatched_bytes += rows * peers * self._traffic.dispatch
        self._combined_bytes += (sum(sizes) - rows) * self._traffic.combine
        self._sampled += sum(entry.samples for entry in step)
        if self._arrivals:
            self._count_admitted(step)

    def report(self, scheduler: Scheduler, sleeps: bool) -> None:
        """To be called after each step, and before the first."""
        now = self._clock()
        elapsed = now - self._reported_at
        if elapsed < REPORT_INTERVAL and not sleeps:
            return
        kv, page_size = scheduler.kv, scheduler.limits.page_size
        num_pages = kv.allocator.num_pages
        self._send(
            RankStats(
                rank=self._rank,
                num_running=len(scheduler.running),
                num_queued=len(scheduler.waiting),
                num_used_tokens=(num_pages - kv.num_available) * page_size,
                num_total_tokens=num_pages * page_size,
                gen_throughput=0.0 if sleeps else self._sampled / elapsed,
                num_retracted=scheduler.num_retracted,
                num_rows=self._num_rows,
                steps_by_rows=tuple(self._steps_by_rows),
                dispatched_bytes=self._dispatched_bytes,
                combined_bytes=self._combined_bytes,
                dp_sync_seconds=self._dp_sync_seconds,
                queue_seconds=tuple(self._queue_seconds),
            )
        )
        self._reported_at, self._sampled = now, 0
        self._queue_seconds.clear()

    def _count_admitted(self, step: Sequence[ScheduledRequest]) -> None:
        now = self._clock()
        for entry in step:
            arrived = self._arrivals.pop(entry.request.request_id, None)
            if arrived is not None:
                self._queue_seconds.append(now - arrived)
