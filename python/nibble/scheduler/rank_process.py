"""One rank as a process: `python -m nibble.scheduler.rank_process RANK RUN_DIR`.

Standard input brings the engine's configuration as one line of JSON and then stays open; its end means that the
engine is gone, and this process with it.
"""

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import setproctitle
import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import CollectiveError
from nibble.distributed.parallel_state import initialize_parallel, moe_comm_backend
from nibble.ipc.messages import (
    GrammarCompiled,
    ProfileWritten,
    RankFailed,
    RankReady,
    RankStage,
    stacks_written_path,
    vocabulary_path,
)
from nibble.ipc.progress import ProgressBoard
from nibble.kernels.select import select_kernels
from nibble.model_executor.model_runner import ModelRunner
from nibble.model_executor.sampler import Sampler
from nibble.model_executor.step_executor import StepExecutor
from nibble.observability.logging import configure_logging
from nibble.observability.rank_profiler import RankProfiler
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.event_loop import EventLoop
from nibble.scheduler.fault_injection import FaultInjection
from nibble.scheduler.prefill_delayer import DelayLimits
from nibble.scheduler.rank_sockets import RankSockets
from nibble.scheduler.rank_statistics import RankStatistics, moe_traffic
from nibble.scheduler.scheduler import Scheduler, SchedulerLimits
from nibble.structured_output.store import GrammarStore
from nibble.utils.errors import ConfigError
from nibble.utils.process import die_with_parent
from nibble.utils.stacks import write_stacks_on_signal

logger = logging.getLogger(__name__)

_FINISH_SECONDS = 1.0
"""Less than the supervisor gives a rank to end by itself."""


def main() -> None:
    rank, run_dir = int(sys.argv[1]), Path(sys.argv[2])
    # Ctrl-C reaches every process of the terminal; the engine decides what becomes of its ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    write_stacks_on_signal(stacks_written_path(run_dir, rank))
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    gpus: list[torch.device] = []  # this rank's, once it has one
    die_with_parent(sys.stdin.fileno(), lambda: _let_finish(gpus))
    setproctitle.setproctitle(f"nibble rank {rank}")
    configure_logging(config.args.log_level, f"rank {rank}", config.args.log_format)
    sockets = RankSockets(run_dir, rank, config.parallel)
    try:
        progress = ProgressBoard(run_dir, config.parallel.world_size)
        _start(config, rank, run_dir, sockets, gpus).run_forever(lambda: progress.advance(rank))
    except Exception as error:
        if not isinstance(error, ConfigError):
            logger.exception("rank %d failed", rank)
        message = str(error) if isinstance(error, ConfigError) else repr(error)
        sockets.send(RankFailed(rank, message, waited_in_vain=isinstance(error, CollectiveError)))
        sockets.close()
        sys.exit(1)


def _let_finish(gpus: Sequence[torch.device]) -> None:
    """Waits a moment for what the GPU has been given, the step behind the last answer for one.

    A process that ends amid a kernel may take down all others that use its GPU through the Multi-Process Service.
    """
    deadline = time.monotonic() + _FINISH_SECONDS
    for gpu in gpus:
        while not torch.cuda.default_stream(gpu).query() and time.monotonic() < deadline:
            time.sleep(0.001)


def _start(config: EngineConfig, rank: int, run_dir: Path, sockets: RankSockets, gpus: list[torch.device]) -> EventLoop:
    torch.set_num_threads(config.cpu_threads)
    faults = FaultInjection.from_environment()

    def on_stage(stage: str) -> None:
        sockets.send(RankStage(rank, stage))
        faults.at_stage(stage)

    on_stage("meeting the other ranks")
    parallel = initialize_parallel(config, rank, run_dir)
    if parallel.device.type == "cuda":
        gpus.append(parallel.device)
    if config.rank_cores:  # only now: the group has looked at how many cores its ranks have together
        os.sched_setaffinity(0, config.rank_cores[config.parallel.index_on_node(rank)])
    runner = ModelRunner(config, parallel, on_stage)
    faults.install(runner.model)
    limits = SchedulerLimits(
        page_size=config.args.page_size,
        chunked_prefill_size=config.args.chunked_prefill_size,
        max_running_requests=config.args.max_running_requests,
        context_length=config.context_length,
        eos_token_ids=frozenset(config.model.eos_token_ids),
        reuse_prefixes=not config.args.disable_radix_cache,
        policy=config.args.schedule_policy,
        max_overtakes=config.args.max_overtakes,
    )
    statistics, dp_rank = None, config.parallel.dp_rank(rank)
    if config.args.enable_metrics:
        traffic = moe_traffic(config, (layer for _, layer in runner.model.layers()))
        statistics = RankStatistics(dp_rank, traffic, sockets.answer)
    sampler = Sampler(config.model.eos_token_ids, select_kernels(config.kernels, config.moe_kernel).argmax)
    grammars = GrammarStore(
        vocabulary_path(run_dir), lambda key, error: sockets.send_from_thread(GrammarCompiled(rank, key, error))
    )
    loop = EventLoop(
        dp_rank,
        Scheduler(limits, runner.pool.num_pages),
        StepExecutor(runner, sampler),
        DpSync(parallel.cpu_group, config.parallel.attn_tp_size, _delay_limits(config)),
        sockets,
        sockets.answer,
        grammars,
        statistics,
        config.overlap_schedule,
        config.args.stream_period,
        RankProfiler(rank, lambda path, error: sockets.send(ProfileWritten(rank, path, error))),
    )
    gc.collect()
    gc.freeze()  # the model stays; collecting garbage need not look at it again
    sockets.send(RankReady(rank, moe_comm_backend(config, parallel)))
    if statistics is not None:
        statistics.report(loop.scheduler, sleeps=True)
    return loop


def _delay_limits(config: EngineConfig) -> DelayLimits | None:
    args = config.args
    if args.disable_prefill_delayer:
        return None
    return DelayLimits(args.prefill_delayer_max_delay_passes, args.prefill_delayer_max_delay_ms)


if __name__ == "__main__":
    main()
