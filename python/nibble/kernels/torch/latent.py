"""What latent attention (MLA) attends with, put together from its parts, in torch."""

import torch
from torch import Tensor

from nibble.kernels.torch.norm import rotate


def rope_latent(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    positions: Tensor,
    cos: Tensor,
    signed_sin: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Queries `[T, N, R + P]` and keys `[T, 1, R + P]`: `q_latent [T, N, R]` and `latent [T, R]` as they are, behind
    them `q_rope [T, N, P]` and `k_rope [T, P]` rotated as `kernels.torch.norm.rotate` does. New tensors.

    Of `interleaved` parts the pairs are (2i, 2i + 1). The result is half-split all the same: products of queries and
    keys do not depend on the order.
    """
    parts = torch.cat([q_rope, k_rope[:, None]], dim=1)  # [T, N + 1, P]
    if interleaved:
        parts = parts.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    rotated = rotate(parts, positions, cos, signed_sin)
    queries = torch.cat([q_latent, rotated[:, :-1]], dim=-1)
    return queries, torch.cat([latent[:, None], rotated[:, -1:]], dim=-1)
