"""The end of the experts: the results of each row's experts on this rank are added, in one kernel."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.torch.fp8_row import Fp8RowLayout
from nibble.kernels.triton.dependent_launch import overlaps_predecessor, wait_for_predecessor
from nibble.kernels.triton.fp8_row import TILE, store_tile


def add_results(results: Tensor, topk_ids: Tensor, first_expert: int, num_experts: int, out: Tensor) -> None:
    """Adds in fp32, in ascending order of expert, what the experts from `first_expert` on have for each row.

    `results` [T * K, H], `topk_ids` int32 [T, K]; where an id is none of these `num_experts`, the result is not read.
    The sums are rounded to the dtype of `results`, and left in `out`, contiguous: [T, H], or as FP8 rows, uint8
    [T, row_bytes], by the contract of `quantize_fp8_rows`. A CUDA graph can capture it. There must be rows. It ends a
    chain of `nibble.kernels.triton.dependent_launch`, from which `results` may come, but not `topk_ids`.
    """
    rows, top_k = topk_ids.shape
    hidden_size = results.shape[1]
    _add_results_kernel[(rows, triton.cdiv(hidden_size, TILE))](
        results,
        topk_ids,
        out,
        topk_ids.stride(0),
        topk_ids.stride(1),
        first_expert,
        HIDDEN_SIZE=hidden_size,
        TOP_K=top_k,
        SLOT_TILE=triton.next_power_of_2(top_k),
        NUM_EXPERTS=num_experts,
        FP8=out.dtype == torch.uint8,
        SCALE_OFFSET=Fp8RowLayout(hidden_size).scale_offset,
        OUT_STRIDE=out.shape[1],
        TILE=TILE,
        num_warps=4,
        launch_pdl=overlaps_predecessor(),
    )


@triton.jit(do_not_specialize=["first_expert"])
def _add_results_kernel(
    results_ptr,
    ids_ptr,
    out_ptr,
    ids_stride,
    ids_slot_stride,
    first_expert,
    HIDDEN_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOT_TILE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    FP8: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.arange(0, SLOT_TILE)
    expert = tl.load(ids_ptr + row * ids_stride + slot * ids_slot_stride, mask=slot < TOP_K, other=-1) - first_expert
    is_local = (expert >= 0) & (expert < NUM_EXPERTS)
    key = tl.where(is_local, expert, NUM_EXPERTS) * SLOT_TILE + slot
    rank = tl.sum((key[None, :] < key[:, None]).to(tl.int32), axis=1)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    acc = tl.zeros([TILE], tl.float32)
    wait_for_predecessor()
    for step in tl.static_range(TOP_K):
        local_slot = tl.sum(tl.where((rank == step) & is_local, slot + 1, 0), axis=0) - 1  # or -1
        result_ptr = results_ptr + (row * TOP_K + local_slot).to(tl.int64) * HIDDEN_SIZE + column
        acc += tl.load(result_ptr, mask=(column < HIDDEN_SIZE) & (local_slot >= 0), other=0.0).to(tl.float32)
    rounded = acc.to(results_ptr.dtype.element_ty)
    out_row_ptr = out_ptr + row.to(tl.int64) * OUT_STRIDE
    if FP8:
        store_tile(rounded.to(tl.float32), tl.program_id(1), out_row_ptr, HIDDEN_SIZE, SCALE_OFFSET, TILE)
    else:
        tl.store(out_row_ptr + column, rounded.to(out_ptr.dtype.element_ty), mask=column < HIDDEN_SIZE)
