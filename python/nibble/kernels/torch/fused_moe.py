"""The routed experts of one rank over gathered rows, in plain torch.

T rows, H hidden, I intermediate, K experts a row, E experts on this rank, n assignments of a row to one of
them. Each expert computes ``down(silu(gate(x)) * up(x))``; a row's result is the weighted sum over its experts
that live here, added in ascending order of expert. The sum over ranks is the caller's.

Ids outside ``[first_expert, first_expert + E)``, also -1 for padding, belong to nobody here: a row with no
other ids gives exact zeros. Rows never mix, so a NaN row gives NaN in its own row only.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.kernels.torch.fp8_row import leave_result
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, fake_quantize_nvfp4


@dataclass(frozen=True, eq=False)
class PackedNvfp4Experts:
    """NVFP4 experts as a checkpoint stores them, stacked. With ``alpha = input_scale * weight_scale_2``, gate and up
    have one alpha each.
    """

    w13: Tensor  # uint8 [E, 2I, H/2], gate rows before up rows
    w13_scales: Tensor  # e4m3 [E, 2I, H/16]
    w2: Tensor  # uint8 [E, H, I/2]
    w2_scales: Tensor  # e4m3 [E, H, I/16]
    g1_gate_up: Tensor  # fp32 [E, 2], alpha of gate and of up
    w2_input_scale: Tensor  # fp32 [E]
    g2: Tensor  # fp32 [E], alpha of down


@dataclass(frozen=True, eq=False)
class Nvfp4Experts:
    """NVFP4 experts, dequantized to e2m1 * e4m3 (exact in fp32); the fp32 scales stay apart.

    With ``alpha = input_scale * weight_scale_2``, gate and up have one alpha each, because a checkpoint may
    give them different `weight_scale_2`.
    """

    w13: Tensor  # fp32 [E, 2I, H], gate rows before up rows
    w2: Tensor  # fp32 [E, H, I]
    g1_gate_up: Tensor  # fp32 [E, 2], alpha of gate and of up
    w2_input_scale: Tensor  # fp32 [E]
    g2: Tensor  # fp32 [E], alpha of down


@dataclass(frozen=True, eq=False)
class _Assignments:
    """The (row, expert) pairs of this rank, by expert and then by row."""

    row: Tensor  # int64 [n]
    expert: Tensor  # int64 [n], local index
    weight: Tensor  # [n]
    counts: list[int]  # pairs of each local expert, E entries


def fused_moe(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor, first_expert: int) -> Tensor:
    """Unquantized experts. `x` [T, H] of any floating dtype; returns [T, H] of that dtype.

    `topk_ids` int32 [T, K] global, `topk_weights` fp32 [T, K], `w13` [E, 2I, H] with gate before up, `w2`
    [E, H, I], both of the dtype of `x`. The activation and the sum over experts are computed in fp32 at least.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=accumulate, device=x.device)
    pairs = _assign(topk_ids, topk_weights, first_expert, w13.shape[0])
    if len(pairs.row) == 0:
        return out.to(x.dtype)
    gate_up = _expert_matmul(x.index_select(0, pairs.row), w13, pairs.counts).to(accumulate)  # [n, 2I]
    gate, up = gate_up.chunk(2, dim=1)
    hidden = (F.silu(gate) * up).to(x.dtype)  # [n, I]
    down = _expert_matmul(hidden, w2, pairs.counts).to(accumulate)  # [n, H]
    down.mul_(pairs.weight.unsqueeze(1))
    return out.index_add_(0, pairs.row, down).to(x.dtype)


def fused_moe_nvfp4(
    x_fp4: Tensor,
    x_scale: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    weights: Nvfp4Experts,
    first_expert: int,
) -> Tensor:
    """W4A4 experts, as ModelOpt calibrates them. Returns fp32 [T, H].

    `x_fp4` uint8 [T, H/2] and `x_scale` float8_e4m3fn [T, H/16] (linear) as `quantize_nvfp4` gives them,
    `topk_ids` int32 [T, K] global, `topk_weights` fp32 [T, K]. Products of e2m1 * e4m3 values are accumulated
    in fp32 and multiplied by alpha after; the intermediate is quantized again with its expert's
    `w2_input_scale`.
    """
    out = torch.zeros(x_fp4.shape[0], weights.w2.shape[1], dtype=torch.float32, device=x_fp4.device)
    if x_fp4.shape[0] == 0:
        return out
    pairs = _assign(topk_ids, topk_weights, first_expert, weights.w13.shape[0])
    if len(pairs.row) == 0:
        return out
    x = dequantize_nvfp4(x_fp4, x_scale)
    gate_up = _expert_matmul(x.index_select(0, pairs.row), weights.w13, pairs.counts)  # [n, 2I]
    alpha = weights.g1_gate_up.index_select(0, pairs.expert).unsqueeze(-1)  # [n, 2, 1]
    gate, up = gate_up.view(len(gate_up), 2, -1).mul_(alpha).unbind(1)
    hidden = fake_quantize_nvfp4(
        F.silu(gate).mul_(up), weights.w2_input_scale.index_select(0, pairs.expert).unsqueeze(1)
    )  # [n, I]
    down = _expert_matmul(hidden, weights.w2, pairs.counts)  # [n, H]
    down.mul_((weights.g2.index_select(0, pairs.expert) * pairs.weight).unsqueeze(1))
    return out.index_add_(0, pairs.row, down)


class Nvfp4MoE:
    """The experts `first_expert`, … of a layer, dequantized once."""

    def __init__(self, packed: PackedNvfp4Experts, first_expert: int, num_experts: int | None = None) -> None:
        self.weights = Nvfp4Experts(
            w13=_dequantize_stack(packed.w13, packed.w13_scales),
            w2=_dequantize_stack(packed.w2, packed.w2_scales),
            g1_gate_up=packed.g1_gate_up,
            w2_input_scale=packed.w2_input_scale,
            g2=packed.g2,
        )
        self.first_expert = first_expert

    def __call__(
        self, x_fp4: Tensor, x_scale: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        result = fused_moe_nvfp4(x_fp4, x_scale, topk_ids, topk_weights, self.weights, self.first_expert)
        return result if out is None else leave_result(result, out)


def _dequantize_stack(values: Tensor, scales: Tensor) -> Tensor:
    """[E, N, K/2] and [E, N, K/16] to fp32 [E, N, K]."""
    flat = dequantize_nvfp4(values.flatten(0, 1), scales.flatten(0, 1))
    return flat.view(*values.shape[:2], -1)


def _assign(topk_ids: Tensor, topk_weights: Tensor, first_expert: int, num_experts: int) -> _Assignments:
    """Sorts the assignments by expert and keeps those of the experts from `first_expert` on."""
    experts, order = topk_ids.reshape(-1).sort(stable=True)  # [T * K], global ids
    edges = torch.arange(first_expert, first_expert + num_experts + 1, dtype=experts.dtype, device=experts.device)
    starts = torch.searchsorted(experts, edges).tolist()
    order = order[starts[0] : starts[-1]]
    return _Assignments(
        row=order // topk_ids.shape[1],
        expert=experts[starts[0] : starts[-1]].long().sub_(first_expert),
        weight=topk_weights.reshape(-1).index_select(0, order),
        counts=[end - start for start, end in pairwise(starts)],
    )


def _expert_matmul(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """``x @ weights[e].T`` for the rows of each expert: [n, in], sorted by expert, and [E, out, in] to [n, out]."""
    out = x.new_empty(x.shape[0], weights.shape[1])
    transposed = weights.mT
    start = 0
    for expert, count in enumerate(counts):
        if count:
            end = start + count
            torch.mm(x[start:end], transposed[expert], out=out[start:end])
            start = end
    return out
