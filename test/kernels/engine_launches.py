"""Calls that launch every Triton kernel as the engine does on a GPU, on tensors without memory (device "meta").

The sizes are those of DeepSeek-R1 and Qwen3-30B-A3B on one of eight ranks that have their own attention.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

import peer_memory_cases
from nibble.distributed import peer_memory
from nibble.distributed.peer_memory import SegmentLayout
from nibble.kernels.torch.fp8_row import Fp8RowLayout
from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.torch.wire_row import unpack as view_rows
from nibble.kernels.triton import fused_moe, nvfp4_linear
from nibble.kernels.triton.fp8_row import quantize_fp8_rows, sum_fp8_rows
from nibble.kernels.triton.kv_cache import store_kv
from nibble.kernels.triton.latent import rope_latent
from nibble.kernels.triton.latent_attention import latent_decode
from nibble.kernels.triton.moe_prepare import prepare
from nibble.kernels.triton.moe_routing import choose_assign_tile
from nibble.kernels.triton.norm import qk_norm_rope
from nibble.kernels.triton.peer_combine import peer_combine, sum_over_hosts
from nibble.kernels.triton.peer_dispatch import peer_dispatch, peer_store
from nibble.kernels.triton.topk import grouped_topk, topk_softmax
from nibble.kernels.triton.wire_row import quantize_pack, unpack

COVERAGES = ("kernels", "choices", "sizes")
"""Each kernel; each with every choice that depends on the number of rows; all that of two models, and in fp32."""
WORLD_SIZE = 8
NUM_HOSTS = 2
FEW_ROWS, MANY_ROWS = 4, 8192


@dataclass(frozen=True)
class Moe:
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int


DEEPSEEK_R1 = Moe(hidden_size=7168, intermediate_size=2048, num_experts=256, top_k=8)
QWEN3_30B_A3B = Moe(hidden_size=2048, intermediate_size=768, num_experts=128, top_k=8)
LINEAR_SIZES = ((7168, 16384), (2112, 7168), (36864, 7168))
"""[N, K] of DeepSeek-R1: what follows attention, what makes queries and keys, a dense layer's gate and up."""


def launch_all(coverage: str) -> None:
    """For one of `COVERAGES`."""
    torch.set_default_dtype(torch.bfloat16)
    launch_kernels(DEEPSEEK_R1, LINEAR_SIZES[:1], coverage != "kernels")
    if coverage == "sizes":
        launch_kernels(QWEN3_30B_A3B, LINEAR_SIZES[1:], choices=True)
        torch.set_default_dtype(torch.float32)
        launch_kernels(DEEPSEEK_R1, LINEAR_SIZES[:1], choices=True)


def launch_kernels(moe: Moe, linear_sizes: Sequence[tuple[int, int]], choices: bool) -> None:
    """For such experts and linear layers, and for attention and routers of both models. Activations are of the default
    dtype.
    """
    launch_experts(moe, choices)
    launch_rows_on_their_way(moe, choices)
    launch_peer_memory(moe)
    for out_features, in_features in linear_sizes:
        launch_linear(out_features, in_features, choices)
    launch_latent_attention(choices)
    launch_attention_of_qwen3()
    launch_routers()


def meta(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def uint8(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.uint8)


def int32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def float32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


def scales(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float8_e4m3fn)


def row_counts(choices: bool, *choose: Callable[[int], Hashable]) -> list[int]:
    """For each value of each function the most rows that have it, or just a few rows."""
    if not choices:
        return [FEW_ROWS]
    last = [{choice(rows): rows for rows in range(1, fused_moe._MAX_ROWS + 1)} for choice in choose]
    return sorted({rows for counts in last for rows in counts.values()})


def launch_experts(moe: Moe, choices: bool) -> None:
    """Rows as a gather brings them; results in a new tensor, and as FP8 rows."""
    hidden, intermediate, local = moe.hidden_size, moe.intermediate_size, moe.num_experts // WORLD_SIZE
    packed = PackedNvfp4Experts(
        w13=uint8(local, 2 * intermediate, hidden // 2),
        w13_scales=scales(local, 2 * intermediate, hidden // 16),
        w2=uint8(local, hidden, intermediate // 2),
        w2_scales=scales(local, hidden, intermediate // 16),
        g1_gate_up=float32(local, 2),
        w2_input_scale=float32(local),
        g2=float32(local),
    )
    experts = fused_moe.Nvfp4MoE(packed, local, moe.num_experts)
    layout = WireRowLayout(hidden, moe.top_k)
    for rows in row_counts(
        choices,
        lambda rows: experts.choose_cut(rows * moe.top_k),
        lambda rows: choose_assign_tile(rows * moe.top_k),
    ):
        gathered = view_rows(uint8(rows, layout.row_bytes), layout)
        for out in (None, uint8(rows, Fp8RowLayout(hidden).row_bytes)):
            experts(gathered.x_fp4, gathered.x_scale, gathered.topk_ids, gathered.topk_weights, out)
    many = view_rows(
        uint8(MANY_ROWS, layout.row_bytes), layout
    )  # of which one kernel counts pairs, and one places them
    prepare(many.x_fp4, many.x_scale, many.topk_ids, local, local, 128, meta(MANY_ROWS, hidden, dtype=torch.float16))


def launch_linear(out_features: int, in_features: int, choices: bool) -> None:
    values, block_scales = uint8(out_features, in_features // 2), scales(out_features, in_features // 16)
    linear = nvfp4_linear.Nvfp4Linear(values, block_scales, float32(), float32(out_features))
    for rows in row_counts(choices, linear.choose_tiling):
        linear(meta(rows, in_features))


def routed_rows(moe: Moe, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `quantize_pack`."""
    return meta(rows, moe.hidden_size), int32(rows, moe.top_k), float32(rows, moe.top_k), float32()


def launch_rows_on_their_way(moe: Moe, choices: bool) -> None:
    """To the experts and back."""
    layout = WireRowLayout(moe.hidden_size, moe.top_k)
    for rows in (FEW_ROWS, MANY_ROWS) if choices else (FEW_ROWS,):
        wire_rows = quantize_pack(*routed_rows(moe, rows))
        for swizzled in (False, True):
            unpack(wire_rows, layout, swizzled)
    fp8_rows = quantize_fp8_rows(meta(WORLD_SIZE * FEW_ROWS, moe.hidden_size))
    sum_fp8_rows(fp8_rows, WORLD_SIZE, moe.hidden_size, torch.get_default_dtype())


def launch_peer_memory(moe: Moe) -> None:
    """From the start of a rank to the end of a step, for either kind of result. Segments do have memory."""
    sizes = [FEW_ROWS] * WORLD_SIZE
    row_bytes = WireRowLayout(moe.hidden_size, moe.top_k).row_bytes
    for fp8_partial in (False, True):
        layout = SegmentLayout(sum(sizes), row_bytes, moe.hidden_size, fp8_partial)
        memory = peer_memory_cases.ranks_of_one_process(WORLD_SIZE, layout)[0]
        with mock.patch("torch.cuda.synchronize"):
            peer_memory._leave_marks(memory)
            peer_memory._why_out_of_reach(memory)
        peer_dispatch(memory, *routed_rows(moe, FEW_ROWS), sizes)
        peer_combine(memory, sizes)
    launch_peer_memory_of_hosts(moe, row_bytes)


def launch_peer_memory_of_hosts(moe: Moe, row_bytes: int) -> None:
    sizes = [FEW_ROWS] * NUM_HOSTS * WORLD_SIZE
    for fp8_partial in (False, True):
        layout = SegmentLayout(sum(sizes), row_bytes, moe.hidden_size, fp8_partial)
        memory = peer_memory_cases.ranks_of_one_process(WORLD_SIZE, layout)[0]
        peer_store(memory, uint8(NUM_HOSTS * FEW_ROWS, row_bytes), sizes)
        sum_over_hosts(peer_combine(memory, sizes).to("meta"), NUM_HOSTS)


def launch_latent_attention(choices: bool) -> None:
    """Queries, keys and decoding steps of DeepSeek-R1; sequences are split where there are few."""
    heads, latent_size, rope_size = 128, 512, 64
    cache = meta(1024, 16, 1, latent_size + rope_size)
    cos, sin = meta(4096, rope_size), meta(4096, rope_size)
    for rows in (FEW_ROWS, MANY_ROWS) if choices else (FEW_ROWS,):
        q_latent = meta(heads, rows, latent_size).transpose(0, 1)
        q_rope = meta(rows, heads, 128 + rope_size)[..., 128:]
        latent, k_rope = meta(rows, latent_size), meta(rows, 2112)[:, -rope_size:]
        positions = meta(rows, dtype=torch.int64)
        queries, _ = rope_latent(q_latent, q_rope, latent, k_rope, positions, cos, sin, interleaved=True)
        latent_decode(queries, cache, int32(rows + 1), int32(4096), int32(rows), latent_size, 0.1)


def launch_attention_of_qwen3() -> None:
    heads, kv_heads, size = 32, 4, 128
    q, k, v = meta(FEW_ROWS, heads + 2 * kv_heads, size).split([heads, kv_heads, kv_heads], dim=1)
    positions = meta(FEW_ROWS, dtype=torch.int64)
    cos, sin = meta(4096, size), meta(4096, size)
    _, k = qk_norm_rope(q, k, meta(size), meta(size), 1e-6, positions, cos, sin)
    store_kv(k, v, positions, meta(1024, 16, kv_heads, size), meta(1024, 16, kv_heads, size))


def launch_routers() -> None:
    topk_softmax(meta(FEW_ROWS, QWEN3_30B_A3B.num_experts), QWEN3_30B_A3B.top_k, True)
    experts = DEEPSEEK_R1.num_experts
    grouped_topk(float32(FEW_ROWS, experts), float32(experts), DEEPSEEK_R1.top_k, 8, 4, True, 2.5)
