"""The gated activation of the feed-forward layers."""

import torch
import torch.nn.functional as F


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for `[T, 2I]` ordered [gate, up] (SwiGLU, arXiv:2002.05202); returns `[T, I]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
