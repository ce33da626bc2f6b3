"""Times dispatch and combine of one MoE layer between ranks on GPUs, DeepSeek-R1's dimensions, under CUDA graphs.

    python benchmark/comm/dispatch.py [--ranks 8] [--rows 8 32 128 512 2048] [--plot dispatch.png]

Ranks beyond the number of GPUs share them; start NVIDIA's Multi-Process Service first. Prints a table in microseconds
per call, then one JSON line. Every figure is the median of replays of a graph of several calls, as rank 0 sees it.
"even" gives every rank the same rows, "uneven" gives rank r up to 3/8 more or fewer. What counts as a call:

    FP4 packed   quantize, pack into wire rows, gather one tensor (quantization is part of the time)
    FP4 list     gather values, scales, expert ids and weights, quantized before and not timed, as four tensors
    FP4 roots    the same with one broadcast per root and tensor also for even sizes, which otherwise NCCL gathers
    BF16         gather the rows, expert ids and weights, not quantized
    all-reduce   put the own BF16 rows into zeros and sum over the ranks, which padding to a common size allows
    combine      sum the partial results, and keep the own rows
    both, list   FP4 roots, then combine
    combine FP8  all-to-all of partial results as FP8 rows, and sum those of the own rows
    peer         through peer memory: dispatch (quantization is part of the time), combine, and one after the other
                 combine FP8: of FP8 rows, quantized before
    results      the experts' last kernel, which leaves their results for the combine, in BF16 or as FP8 rows: the
                 difference is what quantization takes, to be added to a combine of FP8 rows

The floor is what moving the rows once would take: every rank of a GPU reads and writes all rows (FP4 packed; for the
combine BF16 or FP8, of which it reads as many terms as there are ranks, and writes BF16) at the rate of a copy within
the GPU's memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nibble.distributed.peer_memory import PeerMemory, SegmentLayout, open_peer_memory
from nibble.distributed.pynccl import PyNcclCommunicator, multi_rank_gpu_environment
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from nibble.kernels.torch.fp8_row import Fp8RowLayout
from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.triton.fp8_row import sum_fp8_rows
from nibble.kernels.triton.moe_results import add_results
from nibble.kernels.triton.peer_combine import peer_combine
from nibble.kernels.triton.peer_dispatch import peer_dispatch
from nibble.kernels.triton.wire_row import quantize_pack, unpack

HIDDEN_SIZE, TOP_K, NUM_EXPERTS = 7168, 8, 256
LAYOUT = WireRowLayout(HIDDEN_SIZE, TOP_K)
FP8_ROW_BYTES = Fp8RowLayout(HIDDEN_SIZE).row_bytes
PASS_ROWS = 4096  # that the experts take at once
CALLS, REPLAYS = 8, 9
COPY_BYTES = 1 << 30

Results = dict[str, dict[str, float]]  # microseconds by rows per rank and case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128, 512, 2048], help="rows per rank")
    parser.add_argument("--plot", type=Path, help="also draw the table into this file; needs matplotlib")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # set in the processes that this one starts
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        measure_as_rank(args.rank, args.ranks, args.rows, args.run_dir)
        return
    results = start_ranks(args.ranks, args.rows)
    print_table(results)
    machine = {"gpu": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count(), "ranks": args.ranks}
    print(json.dumps({"benchmark": "dispatch", "unit": "us", "machine": machine, "results": results}))
    if args.plot:
        plot(results, args.plot)


def start_ranks(num_ranks: int, rows: list[int]) -> Results:
    ranks_per_gpu = -(-num_ranks // torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, __file__, "--ranks", str(num_ranks), "--rows", *map(str, rows)]
        ranks = [
            subprocess.Popen(
                [*command, "--run-dir", run_dir, "--rank", str(rank)],
                env=os.environ | multi_rank_gpu_environment(ranks_per_gpu),
                stdout=subprocess.PIPE if rank == 0 else None,
                text=True,
            )
            for rank in range(num_ranks)
        ]
        output, _ = ranks[0].communicate()
        if any(rank.wait() for rank in ranks):
            raise SystemExit("a rank failed")
    results: Results = json.loads(output)
    return results


def measure_as_rank(rank: int, num_ranks: int, rows: list[int], run_dir: Path) -> None:
    device = torch.device("cuda", rank * torch.cuda.device_count() // num_ranks)
    torch.cuda.set_device(device)
    cpu_group = SharedMemoryCommunicator(rank, num_ranks, run_dir, "benchmark", timeout_s=60)
    bytes_per_second = copy_rate(device) if rank == 0 else 0.0  # alone on the GPU
    cpu_group.barrier()
    group = PyNcclCommunicator(cpu_group, "dispatch", 60, device)
    ranks_per_gpu = -(-num_ranks // torch.cuda.device_count())
    memory, fp8_memory = (
        open_peer_memory(
            cpu_group, group.device, SegmentLayout(num_ranks * max(rows), LAYOUT.row_bytes, HIDDEN_SIZE, fp8), 30
        )
        for fp8 in (False, True)
    )
    results: Results = {}
    for size in rows:
        calls = cases(group, memory, fp8_memory, size)
        times = {name: time_graph(call, group, cpu_group) for name, call in calls.items()}
        moved = ranks_per_gpu * size * num_ranks / bytes_per_second * 1e6 if rank == 0 else 0.0
        times["floor, FP4"] = 2 * moved * LAYOUT.row_bytes
        times["floor, combine"] = moved * 2 * HIDDEN_SIZE * (1 + 1 / num_ranks)
        times["floor, combine FP8"] = moved * (FP8_ROW_BYTES + 2 * HIDDEN_SIZE / num_ranks)
        results[str(size)] = {name: round(value, 1) for name, value in times.items()}
    for opened in (memory, fp8_memory):
        opened.raise_failure()
        opened.close()
    group.barrier()
    group.close()
    cpu_group.close()
    if rank == 0:
        print(json.dumps(results))


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written a second, of a large copy within the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    rate = 20 * COPY_BYTES / (time.perf_counter() - start)
    del source, target
    torch.cuda.empty_cache()
    return rate


def cases(
    group: PyNcclCommunicator, memory: PeerMemory, fp8_memory: PeerMemory, mean: int
) -> dict[str, Callable[[], object]]:
    even = [mean] * group.world_size
    # The same sum of differences on every machine; none is empty.
    uneven = [max(1, mean + mean * (rank * 5 % 7 - 3) // 8) for rank in range(group.world_size)]
    calls: dict[str, Callable[[], object]] = {}
    for name, sizes in (("even", even), ("uneven", uneven)):
        for case, call in (*cases_of_sizes(group, memory, sizes), *fp8_cases(group, memory, fp8_memory, sizes)):
            calls[f"{case}, {name}"] = call
    return calls


def cases_of_sizes(
    group: PyNcclCommunicator, memory: PeerMemory, sizes: list[int]
) -> list[tuple[str, Callable[[], object]]]:
    device, rows = group.device, sizes[group.rank]
    x = torch.randn(rows, HIDDEN_SIZE, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, NUM_EXPERTS, (rows, TOP_K), device=device, dtype=torch.int32)
    weights = torch.rand(rows, TOP_K, device=device)
    input_scale = torch.tensor(3e-3, device=device)
    fields = unpack(quantize_pack(x, ids, weights, input_scale), LAYOUT)
    four = [fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights]
    partial = torch.randn(sum(sizes), HIDDEN_SIZE, device=device, dtype=torch.bfloat16)
    memory.partial(sum(sizes)).copy_(partial)
    start = sum(sizes[: group.rank])

    def pad_and_all_reduce() -> torch.Tensor:
        everything = x.new_zeros(sum(sizes), HIDDEN_SIZE)
        everything[start : start + rows] = x
        return group.all_reduce(everything)

    def gather_from_roots() -> list[torch.Tensor]:
        gathered = [tensor.new_empty(sum(sizes), tensor.shape[1]) for tensor in four]
        with group._nccl.group():
            for tensor, output in zip(four, gathered, strict=True):
                group._broadcast_rows(tensor, output, tuple(sizes), group._comm_and_stream())
        return gathered

    def combine() -> torch.Tensor:
        return group.reduce_scatterv(partial, sizes)

    def dispatch_to_peers() -> torch.Tensor:
        return peer_dispatch(memory, x, ids, weights, input_scale, sizes)

    def combine_from_peers() -> torch.Tensor:
        return peer_combine(memory, sizes)

    return [
        ("FP4 packed", lambda: group.all_gatherv(quantize_pack(x, ids, weights, input_scale), sizes)),
        ("FP4 list", lambda: group.all_gatherv(four, sizes)),
        ("BF16", lambda: group.all_gatherv([x, ids, weights], sizes)),
        ("all-reduce", pad_and_all_reduce),
        ("combine", combine),
        ("FP4 roots", gather_from_roots),
        ("both, list", lambda: (gather_from_roots(), combine())),
        ("peer dispatch", dispatch_to_peers),
        ("peer combine", combine_from_peers),
        ("peer both", lambda: (dispatch_to_peers(), combine_from_peers())),
    ]


def fp8_cases(
    group: PyNcclCommunicator, memory: PeerMemory, fp8_memory: PeerMemory, sizes: list[int]
) -> list[tuple[str, Callable[[], object]]]:
    """The combine of FP8 rows, and the kernel that leaves results in BF16 or as FP8 rows."""
    num_rows, num_experts = sum(sizes), NUM_EXPERTS // group.world_size
    ids = torch.randint(0, NUM_EXPERTS, (num_rows, TOP_K), device=group.device, dtype=torch.int32)
    pairs = min(num_rows, PASS_ROWS) * TOP_K
    results = torch.randn(pairs, HIDDEN_SIZE, device=group.device, dtype=torch.bfloat16)
    bf16_rows, fp8_rows = memory.partial(num_rows), fp8_memory.partial(num_rows)

    def leave_results(out: torch.Tensor) -> None:
        for part, target in zip(ids.split(PASS_ROWS), out.split(PASS_ROWS), strict=True):
            add_results(results[: part.numel()], part, group.rank * num_experts, num_experts, target)

    def exchange_and_sum() -> torch.Tensor:
        terms = group.all_to_allv(fp8_rows, sizes)
        return sum_fp8_rows(terms, group.world_size, HIDDEN_SIZE, torch.bfloat16)

    leave_results(fp8_rows)
    return [
        ("combine FP8", exchange_and_sum),
        ("peer combine FP8", lambda: peer_combine(fp8_memory, sizes)),
        ("results", lambda: leave_results(bf16_rows)),
        ("results FP8", lambda: leave_results(fp8_rows)),
    ]


def time_graph(call: Callable[[], object], group: PyNcclCommunicator, cpu_group: SharedMemoryCommunicator) -> float:
    """Median microseconds a call."""
    stream = torch.cuda.Stream(group.device)
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        group.synchronize()
        cpu_group.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(CALLS):
                call()
        times = []
        for _ in range(REPLAYS):
            cpu_group.barrier()
            begin = time.perf_counter()
            graph.replay()
            group.synchronize()
            times.append((time.perf_counter() - begin) / CALLS * 1e6)
    cpu_group.barrier()
    return statistics.median(times)


def print_table(results: Results) -> None:
    print(f"{'us per call, rows per rank':28}" + "".join(f"{rows:>9}" for rows in results))
    for case in next(iter(results.values())):
        print(f"{case:28}" + "".join(f"{times[case]:9.1f}" for times in results.values()))


def plot(results: Results, path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = [int(size) for size in results]
    for case in next(iter(results.values())):
        plt.plot(rows, [times[case] for times in results.values()], label=case, ls="--" if "floor" in case else "-")
    plt.xscale("log", base=2)
    plt.yscale("log")
    plt.xlabel("rows per rank")
    plt.ylabel("microseconds per call")
    plt.legend(fontsize="small")
    plt.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
