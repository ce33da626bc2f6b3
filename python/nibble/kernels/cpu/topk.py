"""The router's choice of experts in C."""

import ctypes

import torch
from torch import Tensor

from nibble.kernels.cpu.library import address, c_kernels

_LANES = 16  # of vector.h


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`kernels.torch.topk.topk_softmax`; of equal experts the lower one comes first."""
    rows, experts = router_logits.shape
    logits = router_logits.float().contiguous()
    ids, weights = torch.empty(rows, top_k, dtype=torch.int32), torch.empty(rows, top_k)
    scratch = (ctypes.c_float * (experts + _LANES))()
    c_kernels().topk_softmax(
        address(logits), rows, experts, top_k, renormalize, scratch, address(ids), address(weights)
    )
    return ids, weights
