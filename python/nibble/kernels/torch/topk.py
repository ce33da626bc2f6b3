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
