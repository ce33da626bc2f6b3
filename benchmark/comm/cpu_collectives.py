"""Times the collectives of the CPU backends between processes of this host.

    python benchmark/comm/cpu_collectives.py [--world-sizes 2 4] [--seconds 0.5]

Prints a table in microseconds per call, then one JSON line. dp_sync is what every step begins with: the message of all
ranks and what follows from it. Its limit is 60 us with 8 ranks that have 8 cores. A size is the mean per rank; rank r
of W holds 2(r+1)/(W+1) times that, so no two ranks are equal. Rows are 1 KiB of fp32. Every figure is the median over
batches of calls in a loop, as rank 0 sees it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from nibble.distributed.communicator import Communicator
from nibble.distributed.gloo import GlooCommunicator
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.prefill_delayer import DelayLimits, RankReport

ROW_ELEMENTS = 256  # fp32: 1 KiB
SIZES = {"16 KB": 16, "256 KB": 256, "4 MB": 4096}  # rows per rank, on average
BATCHES = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long each figure is measured")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # set in the processes that this one starts
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        measure_as_rank(int(args.rank), args.world_sizes[0], args.run_dir, args.seconds)
        return
    results = {str(world_size): start_ranks(world_size, args.seconds) for world_size in args.world_sizes}
    print_table(results)
    machine = {"cpu_count": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "cpu_collectives", "unit": "us", "machine": machine, "results": results}))


def start_ranks(world_size: int, seconds: float) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, __file__, "--world-sizes", str(world_size), "--seconds", str(seconds)]
        ranks = [
            subprocess.Popen(
                [*command, "--run-dir", run_dir, "--rank", str(rank)],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE if rank == 0 else None,
                text=True,
            )
            for rank in range(world_size)
        ]
        output, _ = ranks[0].communicate()
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank failed")
    results: dict[str, dict[str, float]] = json.loads(output)
    return results


def measure_as_rank(rank: int, world_size: int, run_dir: Path, seconds: float) -> None:
    communicators: dict[str, Communicator] = {
        "gloo": GlooCommunicator(rank, world_size, f"file://{run_dir}/store", name="benchmark", timeout_s=60),
        "shared_memory": SharedMemoryCommunicator(rank, world_size, run_dir, name="benchmark", timeout_s=60),
    }
    results = {
        backend: {name: time_calls(communicator, call, seconds) for name, call in cases(communicator).items()}
        for backend, communicator in communicators.items()
    }
    for communicator in communicators.values():
        communicator.barrier()
        communicator.close()
    if rank == 0:
        print(json.dumps(results))


def cases(communicator: Communicator) -> dict[str, Callable[[], object]]:
    rank, world_size = communicator.rank, communicator.world_size
    message = torch.arange(8)  # 64 bytes
    sync = DpSync(communicator, delay=DelayLimits(max_passes=30, max_ms=200))
    report = RankReport(64, 64, True, 0, 0, True, sequence=1, step_us=1000)
    calls: dict[str, Callable[[], object]] = {
        "dp_sync": partial(sync.exchange, report),
        "all_gather 64 B": partial(communicator.all_gather, message),
    }
    for label, mean in SIZES.items():
        sizes = [2 * mean * (r + 1) // (world_size + 1) for r in range(world_size)]
        own, terms = torch.randn(sizes[rank], ROW_ELEMENTS), torch.randn(sum(sizes), ROW_ELEMENTS)
        calls[f"all_gatherv {label}"] = partial(communicator.all_gatherv, own, sizes)
        calls[f"reduce_scatterv {label}"] = partial(communicator.reduce_scatterv, terms, sizes)
    return calls


def time_calls(communicator: Communicator, call: Callable[[], object], seconds: float) -> float:
    """Median microseconds a call. Rank 0 chooses the number of calls for all."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    calls = torch.tensor([max(3, int(seconds / BATCHES / (time.perf_counter() - start)))])
    communicator.broadcast(calls, src=0)
    batches = []
    for _ in range(BATCHES):
        communicator.barrier()
        start = time.perf_counter()
        for _ in range(int(calls)):
            call()
        batches.append((time.perf_counter() - start) / int(calls) * 1e6)
    return round(statistics.median(batches), 1)


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    columns = [(world_size, backend) for world_size, backends in results.items() for backend in backends]
    print(f"{'us per call':24}" + "".join(f"{f'{w} x {backend}':>20}" for w, backend in columns))
    for case in next(iter(results.values()))["gloo"]:
        print(f"{case:24}" + "".join(f"{results[w][backend][case]:20.0f}" for w, backend in columns))


if __name__ == "__main__":
    main()
