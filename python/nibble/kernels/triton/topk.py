"""The router's choice of experts in one launch."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl
from torch import Tensor, float32, int32


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`kernels.torch.topk.topk_softmax`; of equal experts the lower one comes first.

    Can be captured in a CUDA graph; no rows launch nothing.
    """
    rows, experts = router_logits.shape
    ids = router_logits.new_empty(rows, top_k, dtype=int32)
    weights = router_logits.new_empty(rows, top_k, dtype=float32)
    if rows:
        _topk_softmax_kernel[(rows,)](
            router_logits,
            ids,
            weights,
            router_logits.stride(0),
            EXPERTS=experts,
            EXPERT_TILE=triton.next_power_of_2(experts),
            TOP_K=top_k,
            SLOT_TILE=triton.next_power_of_2(top_k),
            RENORMALIZE=renormalize,
            num_warps=1,
        )
    return ids, weights


@triton.jit
def _topk_softmax_kernel(
    logits_ptr,
    ids_ptr,
    weights_ptr,
    stride,
    EXPERTS: tl.constexpr,
    EXPERT_TILE: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOT_TILE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERT_TILE)
    logits = tl.load(logits_ptr + row * stride + expert, mask=expert < EXPERTS, other=float("-inf")).to(tl.float32)
    exponentials = tl.exp(logits - tl.max(logits, axis=0))
    remaining = tl.where(expert < EXPERTS, exponentials / tl.sum(exponentials, axis=0), -1.0)
    slot = tl.arange(0, SLOT_TILE)
    ids = tl.zeros([SLOT_TILE], tl.int32)
    weights = tl.zeros([SLOT_TILE], tl.float32)
    for place in tl.static_range(TOP_K):
        best = tl.argmax(remaining, axis=0, tie_break_left=True)
        ids = tl.where(slot == place, best, ids)
        weights = tl.where(slot == place, tl.max(remaining, axis=0), weights)
        remaining = tl.where(expert == best, -1.0, remaining)
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=0)
    tl.store(ids_ptr + row * TOP_K + slot, ids, mask=slot < TOP_K)
    tl.store(weights_ptr + row * TOP_K + slot, weights, mask=slot < TOP_K)
