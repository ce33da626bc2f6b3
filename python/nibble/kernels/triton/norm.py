"""Normalized and rotated heads in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.torch.norm.qk_norm_rope`, computed in fp32 and rounded once.

    The elements of a head must be neighbours. Can be captured in a CUDA graph; no rows launch nothing.
    """
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    (rows, heads, size), kv_heads = q.shape, k.shape[1]
    if rows:
        _qk_norm_rope_kernel[(rows, heads + kv_heads)](
            q,
            k,
            q_weight,
            k_weight,
            positions,
            cos,
            sin,
            q_out,
            k_out,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            HALF=size // 2,
            TILE=triton.next_power_of_2(size // 2),
            num_warps=1,
        )
    return q_out, k_out


@triton.jit
def _qk_norm_rope_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    angle = tl.load(positions_ptr + row) * (2 * HALF)
    if head < HEADS:
        _norm_rope_head(
            q_ptr + row * q_stride + head * q_head_stride, q_weight_ptr, cos_ptr + angle, sin_ptr + angle,
            q_out_ptr + (row * HEADS + head) * (2 * HALF), eps, HALF, TILE,
        )  # fmt: skip
    else:
        head -= HEADS
        _norm_rope_head(
            k_ptr + row * k_stride + head * k_head_stride, k_weight_ptr, cos_ptr + angle, sin_ptr + angle,
            k_out_ptr + (row * KV_HEADS + head) * (2 * HALF), eps, HALF, TILE,
        )  # fmt: skip


@triton.jit
def _norm_rope_head(x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, eps, HALF: tl.constexpr, TILE: tl.constexpr):
    """The halves of a head; `sin` is negative for the first."""
    low = tl.arange(0, TILE)
    high = low + HALF
    mask = low < HALF
    x_low = tl.load(x_ptr + low, mask=mask, other=0.0).to(tl.float32)
    x_high = tl.load(x_ptr + high, mask=mask, other=0.0).to(tl.float32)
    square_sum = tl.sum(x_low * x_low + x_high * x_high, axis=0)
    inverse = tl.rsqrt(square_sum / (2 * HALF) + eps)
    x_low *= inverse * tl.load(weight_ptr + low, mask=mask, other=0.0).to(tl.float32)
    x_high *= inverse * tl.load(weight_ptr + high, mask=mask, other=0.0).to(tl.float32)
    cos_low = tl.load(cos_ptr + low, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + high, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + low, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + high, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + low, (x_low * cos_low + x_high * sin_low).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + high, (x_high * cos_high + x_low * sin_high).to(out_ptr.dtype.element_ty), mask=mask)
