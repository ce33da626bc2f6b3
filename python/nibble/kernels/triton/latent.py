"""What latent attention (MLA) attends with, in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor


def rope_latent(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels.torch.latent.rope_latent`, rotated in fp32 and rounded once.

    The elements of a head must be neighbours. Can be captured in a CUDA graph; no rows launch nothing.
    """
    (rows, heads, rank), size = q_latent.shape, q_rope.shape[-1]
    queries = q_latent.new_empty(rows, heads, rank + size)
    keys = latent.new_empty(rows, 1, rank + size)
    if rows:
        _rope_latent_kernel[(rows, heads + 1)](
            q_latent,
            q_rope,
            latent,
            k_rope,
            positions,
            cos,
            signed_sin,
            queries,
            keys,
            q_latent.stride(0),
            q_latent.stride(1),
            q_rope.stride(0),
            q_rope.stride(1),
            latent.stride(0),
            k_rope.stride(0),
            HEADS=heads,
            RANK=rank,
            RANK_TILE=triton.next_power_of_2(rank),
            HALF=size // 2,
            HALF_TILE=triton.next_power_of_2(size // 2),
            INTERLEAVED=interleaved,
            num_warps=1,
        )
    return queries, keys


@triton.jit
def _rope_latent_kernel(
    q_latent_ptr,
    q_rope_ptr,
    latent_ptr,
    k_rope_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    queries_ptr,
    keys_ptr,
    q_latent_stride,
    q_latent_head_stride,
    q_rope_stride,
    q_rope_head_stride,
    latent_stride,
    k_rope_stride,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    angle = tl.load(positions_ptr + row) * (2 * HALF)
    if head < HEADS:
        _join_head(
            q_latent_ptr + row * q_latent_stride + head * q_latent_head_stride,
            q_rope_ptr + row * q_rope_stride + head * q_rope_head_stride,
            cos_ptr + angle, sin_ptr + angle, queries_ptr + (row * HEADS + head) * (RANK + 2 * HALF),
            RANK, RANK_TILE, HALF, HALF_TILE, INTERLEAVED,
        )  # fmt: skip
    else:
        _join_head(
            latent_ptr + row * latent_stride, k_rope_ptr + row * k_rope_stride,
            cos_ptr + angle, sin_ptr + angle, keys_ptr + row * (RANK + 2 * HALF),
            RANK, RANK_TILE, HALF, HALF_TILE, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _join_head(
    latent_ptr,
    rope_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_TILE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The latent part of a head as it is, and behind it the halves of the rotated one; `sin` is negative for the
    first.
    """
    element = tl.arange(0, RANK_TILE)
    tl.store(out_ptr + element, tl.load(latent_ptr + element, mask=element < RANK), mask=element < RANK)
    low = tl.arange(0, HALF_TILE)
    high = low + HALF
    mask = low < HALF
    first, second = low, high
    if INTERLEAVED:
        first, second = 2 * low, 2 * low + 1
    x_low = tl.load(rope_ptr + first, mask=mask, other=0.0).to(tl.float32)
    x_high = tl.load(rope_ptr + second, mask=mask, other=0.0).to(tl.float32)
    cos_low = tl.load(cos_ptr + low, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + high, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + low, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + high, mask=mask, other=0.0).to(tl.float32)
    out_ptr += RANK
    tl.store(out_ptr + low, (x_low * cos_low + x_high * sin_low).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + high, (x_high * cos_high + x_low * sin_high).to(out_ptr.dtype.element_ty), mask=mask)
