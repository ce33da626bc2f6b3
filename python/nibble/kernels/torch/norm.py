"""Root-mean-square normalization, and rotary embedding after it, in torch."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich, arXiv:1910.07467)."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of `x + residual`, and that sum, which is the next residual.

    Both arguments belong to the callee: an implementation may overwrite them.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def rotate(x: Tensor, positions: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., arXiv:2104.09864) of `x [T, N, D]` at `positions [T]`, int64.

    `cos` and `signed_sin` `[P, D]` hold each angle twice, the sine negative in the first half: pairs are
    (i, i + D/2), as in Hugging Face models. Returns a new tensor.
    """
    half = x.shape[-1] // 2
    return x * cos[positions][:, None] + x.roll(half, dims=-1) * signed_sin[positions][:, None]


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of each head of the queries `[T, N, D]` and the keys `[T, KV, D]`, then `rotate`."""
    q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return rotate(q, positions, cos, sin), rotate(k, positions, cos, sin)
