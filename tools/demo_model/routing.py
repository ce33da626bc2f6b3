"""Keeping the experts evenly used while the model is trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

BALANCE_WEIGHT = 0.02
Z_LOSS_WEIGHT = 1e-4
BIAS_STEP = 1e-3


class Routed(NamedTuple):
    """What the router of one layer said of T tokens."""

    logits: Tensor  # [T, E]
    weights: Tensor  # [T, K]
    ids: Tensor  # [T, K]


def routers(model: PreTrainedModel) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (Qwen3MoeTopKRouter, DeepseekV3TopkRouter))]


def balances_by_bias(model: PreTrainedModel) -> bool:
    """Whether `correct_biases` keeps its experts evenly used; if not, `balance_loss` does."""
    return isinstance(routers(model)[0], DeepseekV3TopkRouter)


@contextmanager
def recorded_routing(model: PreTrainedModel) -> Iterator[list[Routed]]:
    """What the routers say meanwhile, in the order of layers."""
    said: list[Routed] = []
    hooks = [
        router.register_forward_hook(lambda _, __, output: said.append(Routed(*output))) for router in routers(model)
    ]
    try:
        yield said
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(router_logits: Sequence[Tensor], valid: Tensor, top_k: int) -> Tensor:
    """Mean over layers of E · sum_e(share of choices · mean probability) (arXiv:2101.03961, equation 4), 1 when
    even, plus the router z-loss (arXiv:2202.08906, equation 5). `router_logits` [T, E] each, `valid` [T]."""
    total = valid.new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        logits = logits.float()[valid]
        probabilities = logits.softmax(dim=-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k).indices, 1.0 / top_k)
        balance = logits.shape[1] * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()
        total = total + BALANCE_WEIGHT * balance + Z_LOSS_WEIGHT * logits.logsumexp(dim=-1).square().mean()
    return total / len(router_logits)


@torch.no_grad()
def correct_biases(model: PreTrainedModel, routed: Sequence[Routed], valid: Tensor) -> None:
    """Makes experts that were chosen more often than others a step less likely, the others more: DeepSeek-V3's way
    without a loss (arXiv:2408.15664, algorithm 1). `valid` [T]."""
    for router, said in zip(routers(model), routed, strict=True):
        chosen = said.ids[valid].flatten()
        load = torch.bincount(chosen, minlength=said.logits.shape[1]).float()  # [E]
        router.get_buffer("e_score_correction_bias").add_(BIAS_STEP * (load.mean() - load).sign())
