"""The router's choice of experts in torch."""

import torch
from torch import Tensor


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of the softmax over `router_logits [T, E]`, in fp32 whatever the logits are.

    Returns ids int32 `[T, K]` and weights fp32 `[T, K]`, summing to one if `renormalize`.
    """
    probabilities = router_logits.float().softmax(dim=-1)
    weights, ids = probabilities.topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.to(torch.int32), weights


def grouped_topk(
    router_logits: Tensor,
    correction_bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """The `top_k` best experts of the `topk_group` best of `n_group` groups of neighbours, in fp32.

    With a `correction_bias` [E], scores are sigmoids of `router_logits [T, E]`; the bias counts in every choice, but
    not in the weights, and a group is as good as its two best experts together (DeepSeek-V3, arXiv:2412.19437, 2.1.2).
    Without, scores are the softmax, and a group is as good as its best expert (DeepSeek-V2, arXiv:2405.04434, 2.2.2).

    Returns ids int32 `[T, K]` and weights fp32 `[T, K]`: the scores, summing to one if `renormalize`, times
    `scaling_factor`.
    """
    logits = router_logits.float()
    scores = logits.softmax(dim=-1) if correction_bias is None else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if topk_group < n_group:
        groups = choice.unflatten(1, (n_group, -1))  # [T, G, E/G]
        counted = 1 if correction_bias is None else min(2, groups.shape[2])
        best = groups.topk(counted, dim=-1).values.sum(dim=-1).topk(topk_group, dim=-1).indices  # [T, topk_group]
        is_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)  # [T, G]
        choice = groups.masked_fill(is_out[..., None], float("-inf")).flatten(1)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids.to(torch.int32), weights * scaling_factor
