"""Rotary position embedding (Su et al., arXiv:2104.09864), also stretched by YaRN (arXiv:2309.00071)."""

import math

import torch

from nibble.config.model_config import RopeScaling
from nibble.config.resolve import EngineConfig
from nibble.kernels.select import select_kernels
from nibble.layers.norm import RMSNorm
from nibble.utils.dtypes import torch_dtype


class RotaryEmbedding:
    """Rotates pairs (i, i + D/2) of each head by `position * theta^(-2i/D)`, the half-split layout of Hugging Face
    models; D is the model's `rotary_dim`.
    """

    def __init__(self, config: EngineConfig) -> None:
        model, dtype = config.model, torch_dtype(config.dtype)
        frequencies, magnitude = model.rope_theta ** (-_exponents(model.rotary_dim)), 1.0
        if model.rope_scaling:
            frequencies = yarn_frequencies(frequencies, model.rope_theta, model.rope_scaling)
            magnitude = model.rope_scaling.attention_factor
        angles = torch.arange(config.context_length, dtype=torch.float32)[:, None] * frequencies  # [P, D/2]
        cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
        self.cos = torch.cat([cos, cos], dim=-1).to(dtype)  # [P, D]
        # The sign of the first half's sine is folded in: rotating is then one flip of the halves.
        self.signed_sin = torch.cat([-sin, sin], dim=-1).to(dtype)  # [P, D]
        self.kernels = select_kernels(config.kernels, config.moe_kernel)

    def normalized(
        self, q: torch.Tensor, k: torch.Tensor, q_norm: RMSNorm, k_norm: RMSNorm, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q `[T, N, D]` and k `[T, KV, D]`, each head normalized and then rotated to `positions [T]`; new tensors."""
        return self.kernels.qk_norm_rope(
            q, k, q_norm.weight, k_norm.weight, q_norm.eps, positions, self.cos, self.signed_sin
        )

    def latent(
        self,
        q_latent: torch.Tensor,
        q_rope: torch.Tensor,
        latent: torch.Tensor,
        k_rope: torch.Tensor,
        positions: torch.Tensor,
        interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of latent attention: see `kernels.torch.latent.rope_latent`."""
        return self.kernels.rope_latent(
            q_latent, q_rope, latent, k_rope, positions, self.cos, self.signed_sin, interleaved
        )


def _exponents(size: int) -> torch.Tensor:
    return torch.arange(0, size, 2, dtype=torch.float32) / size  # [D/2]


def yarn_frequencies(frequencies: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """`frequencies [D/2]` after YaRN: slow ones divided by its factor, fast ones kept."""
    pairs = len(frequencies)

    def pair_that_turns(rotations: float) -> float:
        """The index, not whole, of the pair that turns so often in the original context."""
        return pairs * math.log(scaling.original_max_position_embeddings / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    stretched = (torch.arange(pairs) - low) / max(high - low, 0.001)  # of an empty interval: a step
    stretched = stretched.clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / scaling.factor * stretched
