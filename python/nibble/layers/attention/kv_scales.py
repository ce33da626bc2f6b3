"""Scales of an FP8 KV cache."""

from dataclasses import replace

import torch

from nibble.config.resolve import EngineConfig
from nibble.layers.attention.backend import AttentionStep
from nibble.layers.weights import WeightTarget, float_target


class KvCacheScales:
    """What keys and values are divided by before they are cached: `k_proj.k_scale` and `v_proj.v_scale`, fp32 scalars.

    Where a checkpoint has none they are one.
    """

    def __init__(self, config: EngineConfig) -> None:
        quantization = config.quantization
        self.in_checkpoint = quantization is not None and quantization.kv_cache_quant_algo == "FP8"
        self.apply = self.in_checkpoint and config.kv_cache_dtype == "fp8_e4m3"
        self.k_scale, self.v_scale = (torch.ones((), dtype=torch.float32) for _ in range(2))

    def attend(
        self, attention: AttentionStep, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """`attention.forward` on keys and values that are scaled in the cache only."""
        if not self.apply:
            return attention.forward(layer, q, k, v)
        return attention.forward(layer, q * self.k_scale, k / self.k_scale, v / self.v_scale) * self.v_scale

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        if not self.in_checkpoint:
            return {}
        scales = {f"{prefix}.k_proj.k_scale": self.k_scale, f"{prefix}.v_proj.v_scale": self.v_scale}
        return {name: replace(float_target(scale, mean=1.0), is_optional=True) for name, scale in scales.items()}
