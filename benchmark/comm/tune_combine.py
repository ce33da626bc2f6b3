"""Times the combine through peer memory cut up in several ways, and dispatch and combine with each of them.

    python benchmark/comm/tune_combine.py [--ranks 8] [--rows 128 512 2048]

Microseconds per call, as benchmark/comm/dispatch.py measures them; every sum is compared with that of torch first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from dispatch import HIDDEN_SIZE, LAYOUT, NUM_EXPERTS, TOP_K, time_graph

from nibble.distributed.peer_memory import PeerMemory, SegmentLayout, open_peer_memory
from nibble.distributed.pynccl import PyNcclCommunicator, multi_rank_gpu_environment
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from nibble.kernels.triton import peer_combine, peer_dispatch

VARIANTS: list[tuple[dict[str, object], int]] = [
    ({}, 1),
    ({}, 2),
    ({}, 4),
    ({"rotates": False}, 1),
    ({"rows_first": False}, 1),
    ({"eviction": ""}, 1),
    ({"max_registers": 32}, 1),
    ({"columns": 512, "num_warps": 2}, 1),
    ({"columns": 2048, "num_warps": 8}, 1),
    ({"columns": 2048, "max_registers": 128}, 1),
    ({"rows_first": False, "columns": 8192, "num_warps": 16, "max_registers": 128}, 1),
    ({"programs_per_multiprocessor": 1}, 1),
    ({"programs_per_multiprocessor": 2}, 1),
    ({"programs_per_multiprocessor": 4}, 1),
    ({"programs_per_multiprocessor": 8}, 1),
    ({"programs_per_multiprocessor": 2, "rows_first": False}, 1),
]
"""Changes of the combine's tiling, and the dispatch's programs per multiprocessor."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 512, 2048], help="rows per rank")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        measure(args.rank, args.ranks, args.rows, args.run_dir)
        return
    ranks_per_gpu = -(-args.ranks // torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, __file__, "--ranks", str(args.ranks), "--rows", *map(str, args.rows)]
        ranks = [
            subprocess.Popen(
                [*command, "--run-dir", run_dir, "--rank", str(rank)],
                env=os.environ | multi_rank_gpu_environment(ranks_per_gpu),
            )
            for rank in range(args.ranks)
        ]
        if any([rank.wait() for rank in ranks]):  # noqa: C419 - wait for all
            raise SystemExit("a rank failed")


def measure(rank: int, num_ranks: int, rows: list[int], run_dir: Path) -> None:
    device = torch.device("cuda", rank * torch.cuda.device_count() // num_ranks)
    torch.cuda.set_device(device)
    cpu_group = SharedMemoryCommunicator(rank, num_ranks, run_dir, "benchmark", timeout_s=60)
    group = PyNcclCommunicator(cpu_group, "dispatch", 60, device)
    layout = SegmentLayout(num_ranks * max(rows), LAYOUT.row_bytes, HIDDEN_SIZE)
    memory = open_peer_memory(cpu_group, group.device, layout, 30)
    default = peer_combine.TILING
    if rank == 0:
        print(f"{'combine / both, rows per rank':>30}" + "".join(f"{size:>16}" for size in rows))
    for change, programs in VARIANTS:
        peer_combine.TILING = replace(default, **change)  # type: ignore[arg-type]
        peer_dispatch._PROGRAMS_PER_MULTIPROCESSOR = programs
        times = [time_sizes(group, cpu_group, memory, size) for size in rows]
        memory.raise_failure()
        if rank == 0:
            cells = "".join(f"{combine:8.1f}{both:8.1f}" for combine, both in times)
            print(f"{cells}  dispatch {programs}, {json.dumps(change)}", flush=True)
    memory.close()
    group.close()
    cpu_group.close()


def time_sizes(
    group: PyNcclCommunicator, cpu_group: SharedMemoryCommunicator, memory: PeerMemory, size: int
) -> tuple[float, float]:
    sizes, device = [size] * group.world_size, group.device
    x = torch.randn(size, HIDDEN_SIZE, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, NUM_EXPERTS, (size, TOP_K), device=device, dtype=torch.int32)
    weights = torch.rand(size, TOP_K, device=device)
    scale = torch.tensor(3e-3, device=device)
    values = torch.randn(sum(sizes), HIDDEN_SIZE, device=device)
    group.broadcast(values, 0)
    memory.partial(sum(sizes)).copy_((values * (group.rank + 1)).bfloat16())
    own = values[size * group.rank : size * (group.rank + 1)]
    total = own.bfloat16().float()
    for rank in range(1, group.world_size):
        total += (own * (rank + 1)).bfloat16().float()
    torch.cuda.synchronize()
    cpu_group.barrier()
    assert torch.equal(peer_combine.peer_combine(memory, sizes), total.bfloat16())

    def combine() -> None:
        peer_combine.peer_combine(memory, sizes)

    def both() -> None:
        peer_dispatch.peer_dispatch(memory, x, ids, weights, scale, sizes)
        combine()

    return time_graph(combine, group, cpu_group), time_graph(both, group, cpu_group)


if __name__ == "__main__":
    main()
