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


def grouped_topk(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """`kernels.torch.topk.grouped_topk`; of equal groups or experts the lower one comes first.

    Can be captured in a CUDA graph; no rows launch nothing.
    """
    rows, experts = router_logits.shape
    ids = router_logits.new_empty(rows, top_k, dtype=int32)
    weights = router_logits.new_empty(rows, top_k, dtype=float32)
    if rows:
        _grouped_topk_kernel[(rows,)](
            router_logits,
            correction_bias,
            ids,
            weights,
            router_logits.stride(0),
            scaling_factor,
            EXPERTS=experts,
            EXPERT_TILE=triton.next_power_of_2(experts),
            TOP_K=top_k,
            SLOT_TILE=triton.next_power_of_2(top_k),
            GROUPS=n_group,
            GROUP_TILE=triton.next_power_of_2(n_group),
            TOP_GROUPS=topk_group,
            IS_BIASED=correction_bias is not None,
            RENORMALIZE=renormalize,
            num_warps=1,
        )
    return ids, weights


@triton.jit
def _grouped_topk_kernel(
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    stride,
    scaling_factor,
    EXPERTS: tl.constexpr,
    EXPERT_TILE: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOT_TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_TILE: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    IS_BIASED: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERT_TILE)
    mask = expert < EXPERTS
    logits = tl.load(logits_ptr + row * stride + expert, mask=mask, other=float("-inf")).to(tl.float32)
    if IS_BIASED:
        scores = 1.0 / (1.0 + tl.exp(-logits))
        choice = scores + tl.load(bias_ptr + expert, mask=mask, other=0.0)
    else:
        exponentials = tl.exp(logits - tl.max(logits, axis=0))
        scores = exponentials / tl.sum(exponentials, axis=0)
        choice = scores
    choice = tl.where(mask, choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        group_of_expert = expert // (EXPERTS // GROUPS)
        group = tl.arange(0, GROUP_TILE)
        quality = tl.full([GROUP_TILE], float("-inf"), tl.float32)
        for place in tl.static_range(GROUPS):
            members = tl.where(group_of_expert == place, choice, float("-inf"))
            best = tl.max(members, axis=0)
            if IS_BIASED and EXPERTS // GROUPS > 1:
                is_best = expert == tl.argmax(members, axis=0, tie_break_left=True)
                best += tl.max(tl.where(is_best, float("-inf"), members), axis=0)
            quality = tl.where(group == place, best, quality)
        is_allowed = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            best_group = tl.argmax(quality, axis=0, tie_break_left=True)
            is_allowed |= group_of_expert == best_group
            quality = tl.where(group == best_group, float("-inf"), quality)
        choice = tl.where(is_allowed, choice, float("-inf"))
    slot = tl.arange(0, SLOT_TILE)
    ids = tl.zeros([SLOT_TILE], tl.int32)
    weights = tl.zeros([SLOT_TILE], tl.float32)
    for place in tl.static_range(TOP_K):
        best = tl.argmax(choice, axis=0, tie_break_left=True)
        ids = tl.where(slot == place, best, ids)
        weights = tl.where(slot == place, tl.sum(tl.where(expert == best, scores, 0.0), axis=0), weights)
        choice = tl.where(expert == best, float("-inf"), choice)
    if RENORMALIZE:
        weights /= tl.sum(weights, axis=0) + 1e-20
    tl.store(ids_ptr + row * TOP_K + slot, ids, mask=slot < TOP_K)
    tl.store(weights_ptr + row * TOP_K + slot, weights * scaling_factor, mask=slot < TOP_K)
