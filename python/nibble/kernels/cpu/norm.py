"""Normalization in C."""

import torch
from torch import Tensor

from nibble.kernels.cpu.library import address, c_kernels
from nibble.kernels.torch import norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.torch.norm.rms_norm` for `x [T, H]`; the result is contiguous."""
    if x.dtype != torch.float32 or x.stride(1) != 1:
        return norm.rms_norm(x, weight, eps)
    rows, columns = x.shape
    out = torch.empty(rows, columns)
    c_kernels().rms_norm(address(x), rows, x.stride(0), columns, address(weight), eps, address(out))
    return out


def norm_rope(x: Tensor, weight: Tensor, eps: float, positions: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """`kernels.torch.norm.norm_rope`; heads of a row lie after each other, rows may lie apart."""
    rows, heads, size = x.shape
    if x.dtype != torch.float32 or x.stride()[1:] != (size, 1) or size % 2:
        return norm.norm_rope(x, weight, eps, positions, cos, signed_sin)
    out = torch.empty(rows, heads, size)
    c_kernels().norm_rope(
        address(x), rows, x.stride(0), heads, size, address(weight), eps,
        address(positions), address(cos), address(signed_sin), address(out),
    )  # fmt: skip
    return out
