"""Times decoding steps of a model on GPUs, and says where the time goes.

    python benchmark/decode_step.py --model-path FOLDER [--ranks 8] [--batch-size 1 8 64] [--context 512] [--no-fp4]
        [--moe-comm-backend auto]

Weights are random (`--load-format dummy`), so a folder with config.json and hf_quant_config.json is enough. Every rank
decodes `--batch-size` requests of `--context` tokens as one replay of a CUDA graph; ranks beyond the number of GPUs
share them, for which NVIDIA's Multi-Process Service should run. Prints the milliseconds of a step (median of replays,
as rank 0 sees it), the memory of a rank, and how the time of rank 0's kernels divides over attention, dispatch,
experts, combine, linear layers and the rest, by torch's profiler; kernels that wait for other ranks count as long as
they wait. With `--no-fp4` BF16 rows are gathered. One JSON line comes last.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[1] / "test" / "distributed"))
from nibble.config.resolve import EngineConfig, resolve
from nibble.config.server_args import ServerArgs
from nibble.distributed.parallel_state import initialize_parallel
from nibble.distributed.pynccl import multi_rank_gpu_environment
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner
from rank_processes import Rank, RankProcesses

REPLAYS = 30
PROFILED = 5
PARTS = {
    "attention": (
        "BatchPrefill",
        "BatchDecode",
        "PersistentVariableLength",
        "MLA",
        "_attend_kernel",
        "_merge_kernel",
        "_store_",
        "MergeStates",
        "rope_latent",
        "index_copy",
    ),
    "dispatch": ("_pack_kernel", "AllGather", "Broadcast", "_dispatch_kernel"),
    "combine": ("ReduceScatter", "Reduce_", "_peer_sum_kernel", "SendRecv", "_fp8_kernel", "meet_kernel"),
    "experts": (
        "_prepare_kernel",
        "place_kernel",
        "_gate_up_kernel",
        "_sum_splits_kernel",
        "_down_kernel",
        "_add_results_kernel",
    ),
    "linear": ("_linear_kernel", "_quantize_kernel", "_sum_kernel", "gemm", "nvjet", "cutlass"),
}
"""What the names of a part's kernels contain; the first part that fits counts. All others are the rest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 64], help="requests of each rank")
    parser.add_argument("--context", type=int, default=512, help="tokens of each request")
    parser.add_argument("--no-fp4", action="store_true", help="gather BF16 rows")
    parser.add_argument("--moe-comm-backend", default="auto", choices=("auto", "nccl", "peer"))
    parser.add_argument("--moe-combine-dtype", default="bf16", choices=("bf16", "fp8"))
    args = parser.parse_args()
    flags: dict[str, Any] = {
        "model_path": args.model_path,
        "device": "cuda",
        "load_format": "dummy",
        "tp_size": args.ranks,
        "dp_size": args.ranks,
        "ep_size": args.ranks,
        "enable_dp_attention": True,
        "enable_flashinfer_cutlass_moe": True,
        "disable_flashinfer_cutlass_moe_fp4_allgather": args.no_fp4,
        "moe_comm_backend": args.moe_comm_backend,
        "moe_combine_dtype": args.moe_combine_dtype,
        "context_length": args.context + 1,
        "max_running_requests": max(args.batch_size),
        "cuda_graph_max_bs": max(args.batch_size),
    }
    config = resolve(ServerArgs(**flags))
    if args.ranks > 1:
        os.environ.update(multi_rank_gpu_environment(config.ranks_per_gpu))
    with tempfile.TemporaryDirectory() as folder, RankProcesses(args.ranks, Path(folder), timeout_s=540) as ranks:
        results = ranks.run(measure, flags=flags, batch_sizes=args.batch_size, context=args.context)[0]
    report(config, results)


def measure(rank: Rank, flags: dict[str, Any], batch_sizes: list[int], context: int) -> dict[str, Any]:
    config = resolve(ServerArgs(**flags))
    parallel = initialize_parallel(config, rank.rank, rank.run_dir)
    runner = ModelRunner(config, parallel)
    steps = {}
    for count in batch_sizes:
        batch, sizes = decoding(runner, count, context), [count] * rank.world_size
        seconds = []
        for _ in range(REPLAYS):
            parallel.cpu_group.barrier()
            start = time.perf_counter()
            runner.forward(batch, sizes, decodes_only=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        steps[str(count)] = {"ms": statistics.median(seconds) * 1e3, "parts": parts(rank.rank, runner, batch, sizes)}
    memory = {
        "allocated": torch.cuda.memory_allocated() / 2**30,
        "kv_cache": sum(tensor.nbytes for tensor in runner.pool.tensors) / 2**30,
    }
    return {"steps": steps, "memory_gib": memory}


def decoding(runner: ModelRunner, count: int, context: int) -> ForwardBatch:
    each = -(-(context + 1) // runner.pool.page_size)
    tables = [[page % runner.pool.num_pages for page in range(i * each, (i + 1) * each)] for i in range(count)]
    attention = AttentionBatch([1] * count, [context + 1] * count, tables)
    tokens = torch.randint(0, runner.config.model.vocab_size, (count,)).tolist()
    return ForwardBatch(tokens, [context] * count, attention, list(range(count)))


def parts(rank: int, runner: ModelRunner, batch: ForwardBatch, sizes: list[int]) -> dict[str, float]:
    """Milliseconds of each part's kernels in one step of this rank."""
    if rank > 0:  # takes part, unobserved
        for _ in range(PROFILED):
            runner.forward(batch, sizes, decodes_only=True)
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            runner.forward(batch, sizes, decodes_only=True)
        torch.cuda.synchronize()
    found = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in profiler.key_averages():
        part = next((part for part, names in PARTS.items() if any(name in event.key for name in names)), "rest")
        found[part] += event.self_device_time_total / PROFILED / 1e3
    return found


def report(config: EngineConfig, results: dict[str, Any]) -> None:
    print(f"{torch.cuda.get_device_name()}, {config.parallel.world_size} ranks, {config.model.architecture}")
    print("; ".join(config.decisions()[:4]))
    memory = results["memory_gib"]
    print(f"memory of rank 0: {memory['allocated']:.2f} GiB allocated, {memory['kv_cache']:.2f} of it KV cache")
    names = [*PARTS, "rest"]
    print(f"{'batch':>6}{'step ms':>9}" + "".join(f"{name:>11}" for name in names))
    for count, step in results["steps"].items():
        print(f"{count:>6}{step['ms']:9.2f}" + "".join(f"{step['parts'][name]:11.3f}" for name in names))
    print(json.dumps({"benchmark": "decode_step", "gpu": torch.cuda.get_device_name(), **results}))


if __name__ == "__main__":
    main()
