"""The router's choice of experts in C."""

import torch
from torch import Tensor

from nibble.kernels.cpu.library import as_fp32, c_kernels


def topk_softmax(router_logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """`kernels.torch.topk.topk_softmax`; of equal experts the lower one comes first."""
    rows, experts = router_logits.shape
    logits = as_fp32(router_logits)
    ids, weights = torch.empty(rows, top_k, dtype=torch.int32), torch.empty(rows, top_k)
    if rows:
        c_kernels().topk_softmax(
            logits.data_ptr(), rows, experts, top_k, renormalize, ids.data_ptr(), weights.data_ptr()
        )
    return ids, weights
