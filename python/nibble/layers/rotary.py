"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split layout of Hugging Face models."""

import torch

from nibble.config.resolve import EngineConfig
from nibble.kernels.select import select_kernels
from nibble.layers.norm import RMSNorm
from nibble.utils.dtypes import torch_dtype


class RotaryEmbedding:
    """Rotates pairs (i, i + head_dim/2) of each head by `position * theta^(-2i/head_dim)`."""

    def __init__(self, config: EngineConfig) -> None:
        size, dtype = config.model.head_dim, torch_dtype(config.dtype)
        inverse_frequency = config.model.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(config.context_length, dtype=torch.float32)[:, None] * inverse_frequency  # [P, D/2]
        self.cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(dtype)  # [P, D]
        # The sign of the first half's sine is folded in: rotating is then one flip of the halves.
        self.signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(dtype)  # [P, D]
        self.qk_norm_rope = select_kernels(config.kernels, config.moe_kernel).qk_norm_rope

    def normalized(
        self, q: torch.Tensor, k: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q `[T, N, D]` and k `[T, KV, D]`, each head normalized and then rotated to `positions [T]`; new tensors."""
        return self.qk_norm_rope(q, k, q_norm.weight, k_norm.weight, q_norm.eps, positions, self.cos, self.signed_sin)
