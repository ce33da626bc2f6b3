"""The router's choice of experts, as the checkpoint describes it."""

from collections.abc import Callable

import torch

from nibble.config.resolve import EngineConfig
from nibble.kernels.select import select_kernels

TopK = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""`router_logits [T, E]` to ids int32 `[T, K]` and weights fp32 `[T, K]`."""


def make_topk(config: EngineConfig, correction_bias: torch.Tensor | None) -> TopK:
    """`correction_bias` fp32 [E] belongs to routing by sigmoids; see `kernels.torch.topk.grouped_topk`."""
    moe, kernels = config.model.moe, select_kernels(config.kernels, config.moe_kernel)
    assert moe is not None
    routing = moe.routing
    if routing is None:
        return lambda logits: kernels.topk_softmax(logits, moe.top_k, moe.norm_topk_prob)
    return lambda logits: kernels.grouped_topk(
        logits,
        correction_bias,
        moe.top_k,
        routing.n_group,
        routing.topk_group,
        moe.norm_topk_prob,
        routing.routed_scaling_factor,
    )
