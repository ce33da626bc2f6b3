"""Times the NVFP4 experts and the NVFP4 linear layer of the Triton backend on a GPU.

    python benchmark/kernels/nvfp4_experts.py [--model deepseek-r1 qwen3-30b-a3b] [--rows 1 8 64 256 512 4096]

Prints a table, then one JSON line. Rows are gathered rows with random routing, the same in every run; DeepSeek-R1 has
the 32 experts of one of 8 ranks, Qwen3-30B-A3B all of them. "GB/s" counts the packed weights and scales of the experts
touched, "share" is that in percent of the bytes that a large copy reads and writes a second; "TFLOP/s" counts the
products of this rank's pairs, "of mm" is that in percent of a BF16 matrix product of 8192 cubed. "bf16 us" are the same
experts with BF16 weights, the best of several tilings of a Triton kernel like ours and of
`torch.nn.functional.grouped_mm`, which gets sorted rows and neither sorts nor combines. Each figure is the median over
replays of a CUDA graph with calls on different routing.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import argparse
import json
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from wire_row import measure_copy_bandwidth, median_seconds, time_calls

from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.triton.fused_moe import Nvfp4MoE
from nibble.kernels.triton.moe_prepare import prepare
from nibble.kernels.triton.moe_results import add_results
from nibble.kernels.triton.moe_routing import load_block, load_pairs
from nibble.kernels.triton.nvfp4_linear import Nvfp4Linear

LINEAR_SHAPES = [(2112, 7168), (7168, 16384), (5120, 2048)]  # out, in


@dataclass(frozen=True)
class Model:
    hidden: int
    intermediate: int
    experts: int
    local_experts: int
    top_k: int

    @property
    def expert_values(self) -> int:
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> int:
        return self.expert_values // 2 + self.expert_values // 16


MODELS = {
    "deepseek-r1": Model(7168, 2048, 256, 32, 8),
    "qwen3-30b-a3b": Model(2048, 768, 128, 128, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 512, 4096])
    args = parser.parse_args()
    copy_bandwidth, matmul_rate = measure_copy_bandwidth(), measure_matmul_rate()
    device = torch.cuda.get_device_name()
    print(f"{device}; a large copy moves {copy_bandwidth / 1e9:.0f} GB/s, BF16 {matmul_rate / 1e12:.0f} TFLOP/s")
    print(
        f"{'':20}{'rows':>6}{'us':>9}{'GB/s':>7}{'share %':>9}{'TFLOP/s':>9}{'of mm %':>9}{'bf16 us':>9}{'faster':>8}"
    )
    results = []
    for name in args.model:
        model = MODELS[name]
        packed, bf16 = random_experts(model), Bf16Experts(model)
        moe = Nvfp4MoE(packed, 0, model.experts)
        del packed
        for rows in args.rows:
            results.append(measure(name, rows, moe, bf16, copy_bandwidth, matmul_rate))
        del moe, bf16
    for out_features, in_features in LINEAR_SHAPES:
        for rows in args.rows:
            results.append(measure_linear(out_features, in_features, rows, copy_bandwidth, matmul_rate))
    rates = {"copy_gb_per_s": copy_bandwidth / 1e9, "matmul_tflop_per_s": matmul_rate / 1e12}
    print(json.dumps({"benchmark": "nvfp4_experts", "device": device, **rates, "results": results}))


def measure(
    name: str, rows: int, moe: Nvfp4MoE, bf16: "Bf16Experts", copy_bandwidth: float, matmul_rate: float
) -> dict[str, object]:
    batches = random_batches(MODELS[name], rows)
    seconds = time_calls([partial(moe, *batch) for batch in batches])
    bf16_seconds = bf16.best_seconds(batches)
    touched, pairs = mean_load(MODELS[name], batches)
    num_bytes, flops = touched * MODELS[name].expert_bytes, 2 * pairs * MODELS[name].expert_values
    return report(name, rows, seconds, num_bytes / copy_bandwidth, flops / matmul_rate, num_bytes, flops, bf16_seconds)


def measure_linear(
    out_features: int, in_features: int, rows: int, copy_bandwidth: float, matmul_rate: float
) -> dict[str, object]:
    values, scales = random_matrix(out_features, in_features)
    num_bytes, flops = values.numel() + scales.numel(), 2 * rows * out_features * in_features
    copies = min(16, 1 + 2**28 // num_bytes)
    alpha = torch.ones(out_features, device="cuda")
    linear = Nvfp4Linear(values, scales, torch.tensor(0.002, device="cuda"), alpha)
    linears = [linear, *(Nvfp4Linear(values, scales, linear.input_scale, alpha) for _ in range(copies - 1))]
    x = torch.randn(rows, in_features, dtype=torch.bfloat16, device="cuda")
    seconds = time_calls([partial(layer, x) for layer in linears])
    weight = torch.randn(out_features, in_features, dtype=torch.bfloat16, device="cuda")
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    bf16_seconds = time_calls([partial(F.linear, x, matrix) for matrix in weights])
    name = f"linear {out_features}x{in_features}"
    return report(name, rows, seconds, num_bytes / copy_bandwidth, flops / matmul_rate, num_bytes, flops, bf16_seconds)


def report(
    name: str,
    rows: int,
    seconds: float,
    copy_seconds: float,
    matmul_seconds: float,
    num_bytes: float,
    flops: float,
    bf16_seconds: float,
) -> dict[str, object]:
    print(
        f"{name:20}{rows:6}{seconds * 1e6:9.1f}{num_bytes / seconds / 1e9:7.0f}{100 * copy_seconds / seconds:9.1f}"
        f"{flops / seconds / 1e12:9.1f}{100 * matmul_seconds / seconds:9.1f}{bf16_seconds * 1e6:9.1f}"
        f"{bf16_seconds / seconds:8.2f}",
        flush=True,
    )
    shares = {"share_of_copy": copy_seconds / seconds, "share_of_matmul": matmul_seconds / seconds}
    return {"name": name, "rows": rows, "us": seconds * 1e6, **shares, "bf16_us": bf16_seconds * 1e6}


def measure_matmul_rate() -> float:
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / median_seconds(partial(torch.mm, a, b))


def random_matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Any codes, and scales from 2^-3 to 2^-1."""
    values = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
    scales = torch.randint(32, 48, (rows, columns // 16), dtype=torch.uint8, device="cuda")
    return values, scales.view(torch.float8_e4m3fn)


def random_experts(model: Model) -> PackedNvfp4Experts:
    experts = model.local_experts
    w13, w13_scales = random_matrix(experts * 2 * model.intermediate, model.hidden)
    w2, w2_scales = random_matrix(experts * model.hidden, model.intermediate)
    return PackedNvfp4Experts(
        w13=w13.view(experts, 2 * model.intermediate, -1),
        w13_scales=w13_scales.view(experts, 2 * model.intermediate, -1),
        w2=w2.view(experts, model.hidden, -1),
        w2_scales=w2_scales.view(experts, model.hidden, -1),
        g1_gate_up=torch.full((experts, 2), 1e-4, device="cuda"),
        w2_input_scale=torch.full((experts,), 1e-3, device="cuda"),
        g2=torch.full((experts,), 1e-3, device="cuda"),
    )


def random_batches(model: Model, rows: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    torch.manual_seed(rows)
    batches = []
    for _ in range(32 if rows <= 16 else 8 if rows <= 1024 else 2):
        x_fp4, x_scale = random_matrix(rows, model.hidden)
        ids = torch.rand(rows, model.experts, device="cuda").topk(model.top_k).indices.int()
        batches.append((x_fp4, x_scale, ids, torch.rand(rows, model.top_k, device="cuda")))
    return batches


def mean_load(model: Model, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Experts touched and pairs of this rank, in a call."""
    local = [ids[ids < model.local_experts] for _, _, ids, _ in batches]
    return sum(len(ids.unique()) for ids in local) / len(local), sum(len(ids) for ids in local) / len(local)


class Bf16Experts:
    """The experts with BF16 weights, to compare with."""

    def __init__(self, model: Model) -> None:
        self.model = model
        shape = (model.local_experts, 2 * model.intermediate, model.hidden)
        self.w13 = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
        self.w2 = self.w13.new_empty(model.local_experts, model.hidden, model.intermediate).normal_(std=0.02)

    def best_seconds(self, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> float:
        rows = len(batches[0][2])
        inputs = [
            (torch.randn(rows, self.model.hidden, dtype=torch.bfloat16, device="cuda"), ids, weights)
            for _, _, ids, weights in batches
        ]
        pairs = rows * self.model.top_k / self.model.experts
        tilings = [(16, 64, 128, 4, 5), (16, 128, 64, 4, 6)] if pairs < 24 else []
        tilings += [(32, 64, 128, 4, 4), (32, 128, 64, 4, 5)] if 4 < pairs < 48 else []
        tilings += [(64, 128, 64, 4, 4)] if 16 < pairs < 100 else []
        tilings += [(128, 128, 64, 8, 4), (128, 128, 64, 4, 4)] if pairs >= 48 else []
        times = [time_calls([partial(self.run, tiling, *batch) for batch in inputs]) for tiling in tilings]
        if pairs >= 4:
            times.append(time_calls([self.grouped_call(*batch[:2]) for batch in inputs]))
        return min(times)

    def grouped_call(self, x: Tensor, topk_ids: Tensor) -> partial[Tensor]:
        """The two products by torch, on rows sorted beforehand."""
        model = self.model
        local = topk_ids[topk_ids < model.local_experts]
        offsets = torch.bincount(local, minlength=model.local_experts).cumsum(0).int()
        return partial(self.run_grouped, x.new_empty(len(local), model.hidden).normal_(), offsets)

    def run_grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        gate, up = F.grouped_mm(x, self.w13.mT, offs=offsets).chunk(2, dim=1)
        return F.grouped_mm(F.silu(gate) * up, self.w2.mT, offs=offsets)

    def run(self, tiling: tuple[int, ...], x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        block_m, block_n, block_k, num_warps, num_stages = tiling
        model, (rows, top_k) = self.model, topk_ids.shape
        pairs = rows * top_k
        hidden, results = x.new_empty(pairs, model.intermediate), x.new_empty(pairs, model.hidden)
        out = torch.empty_like(x)
        blocks = prepare(x, x, topk_ids, 0, model.local_experts, block_m, x[:, :0])
        shared = dict(TOP_K=top_k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k)
        shared |= dict(num_warps=num_warps, num_stages=num_stages)
        programs = torch.cuda.get_device_properties(0).multi_processor_count * (1 if num_warps == 8 else 2)
        for source, weights, target, factors in ((x, self.w13, hidden, None), (hidden, self.w2, results, topk_weights)):
            _bf16_kernel[(programs,)](
                weights, source, factors, blocks.pairs, blocks.experts_and_counts, blocks.num_blocks, target,
                blocks.max_blocks,
                ROWS=weights.shape[1], COLUMNS=weights.shape[2], GATED=factors is None, **shared,
            )  # fmt: skip
        add_results(results, topk_ids, 0, model.local_experts, out)
        return out


@triton.jit(do_not_specialize=["max_blocks"])
def _bf16_kernel(
    w_ptr,
    x_ptr,
    factor_ptr,
    sorted_pairs_ptr,
    blocks_ptr,
    num_blocks_ptr,
    out_ptr,
    max_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gate, up and SwiGLU, eight rows of gate before the eight of up; or down."""
    ROW_TILES: tl.constexpr = ROWS // BLOCK_N
    OUT_N: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    num_tiles = tl.load(num_blocks_ptr) * ROW_TILES
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        block, row_tile = tile // ROW_TILES, tile % ROW_TILES
        expert, num_pairs = load_block(block, blocks_ptr, max_blocks)
        pair, mask = load_pairs(block, sorted_pairs_ptr, num_pairs, BLOCK_M, BLOCK_M)
        row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column = tl.arange(0, BLOCK_K)[None, :]
        w_ptrs = w_ptr + expert * (ROWS * COLUMNS) + row[:, None] * COLUMNS + column
        x_row = pair // TOP_K if GATED else pair
        x_ptrs = x_ptr + x_row.to(tl.int64)[:, None] * COLUMNS + column
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for _ in range(0, COLUMNS, BLOCK_K):
            acc = tl.dot(tl.load(w_ptrs), tl.load(x_ptrs, mask=mask[:, None], other=0.0).T, acc)
            w_ptrs += BLOCK_K
            x_ptrs += BLOCK_K
        if GATED:
            gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
            acc = (gate / (1.0 + tl.exp(-gate)) * up).reshape(OUT_N, BLOCK_M)
        else:
            acc *= tl.load(factor_ptr + pair, mask=mask, other=0.0)[None, :]
        out_row = row_tile * OUT_N + tl.arange(0, OUT_N)
        out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * (ROWS // BLOCK_N * OUT_N) + out_row[None, :]
        tl.store(out_ptrs, acc.T.to(tl.bfloat16), mask=mask[:, None])


if __name__ == "__main__":
    main()
