"""Root-mean-square normalization in C."""

import torch
from torch import Tensor

from nibble.kernels.cpu.library import address, c_kernels
from nibble.kernels.torch import norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.torch.norm.rms_norm` for `x` of two or three dimensions; the result is contiguous."""
    if x.dtype != torch.float32 or x.stride(-1) != 1:
        return norm.rms_norm(x, weight, eps)
    heads, head_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    out = torch.empty(x.shape)
    c_kernels().rms_norm(
        address(x), x.shape[0], x.stride(0), heads, head_stride, x.shape[-1], address(weight), eps, address(out)
    )
    return out
