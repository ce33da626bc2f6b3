"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split layout of Hugging Face models."""

import torch


class RotaryEmbedding:
    """Rotates pairs (i, i + head_dim/2) of each head by `position * theta^(-2i/head_dim)`."""

    def __init__(self, head_dim: int, max_position: int, theta: float, dtype: torch.dtype) -> None:
        inverse_frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.arange(max_position, dtype=torch.float32)[:, None] * inverse_frequency  # [P, D/2]
        self.cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(dtype)  # [P, D]
        # The sign of the first half's sine is folded in: rotating is then one flip of the halves.
        self.signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(dtype)  # [P, D]

    def __call__(self, positions: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """`heads [T, N, D]` at `positions [T]`; returns a new tensor."""
        cos = self.cos[positions][:, None]  # [T, 1, D]
        sin = self.signed_sin[positions][:, None]
        half = heads.shape[-1] // 2
        return heads * cos + heads.roll(half, dims=-1) * sin
