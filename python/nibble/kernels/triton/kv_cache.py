"""Storing keys and values in the paged cache, in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor


def store_kv(k: Tensor, v: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Writes `k` and `v` [T, kv_heads, D] to `slots` [T] (int64) of a cache, rounded to its type.

    `keys` and `values` are `[pages, page_size, kv_heads, D]`, contiguous; the heads of a row of `k` and `v` must be,
    too. Slots must differ, but for those whose content does not matter. Can be captured in a CUDA graph; no rows
    launch nothing.
    """
    rows, heads, head_dim = k.shape
    if rows == 0:
        return
    _store_kv_kernel[(rows, 2)](
        k,
        v,
        slots,
        keys,
        values,
        k.stride(0),
        v.stride(0),
        SIZE=heads * head_dim,
        TILE=triton.next_power_of_2(heads * head_dim),
        num_warps=4,
    )


@triton.jit
def _store_kv_kernel(
    k_ptr, v_ptr, slots_ptr, keys_ptr, values_ptr, k_stride, v_stride, SIZE: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    mask = column < SIZE
    place = tl.load(slots_ptr + row) * SIZE + column
    if tl.program_id(1) == 0:
        key = tl.load(k_ptr + row * k_stride + column, mask=mask)
        tl.store(keys_ptr + place, key.to(keys_ptr.dtype.element_ty), mask=mask)
    else:
        value = tl.load(v_ptr + row * v_stride + column, mask=mask)
        tl.store(values_ptr + place, value.to(values_ptr.dtype.element_ty), mask=mask)
