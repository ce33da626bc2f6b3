"""Unquantized linear layers on a CPU: small ones in C, where calling a library costs more than the arithmetic."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.kernels.cpu.library import c_kernels

_MAX_RESULTS = 8192
"""Outputs times rows up to which C is faster, measured on a Xeon with AVX-512."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` for `x [T, K]` and `weight [N, K]`."""
    (rows, columns), outputs = x.shape, weight.shape[0]
    is_small = rows * outputs <= _MAX_RESULTS and bias is None and x.dtype == weight.dtype == torch.float32
    if not (is_small and x.is_contiguous() and weight.is_contiguous()):
        return F.linear(x, weight, bias)
    out = torch.empty(rows, outputs)
    if rows:
        c_kernels().linear(x.data_ptr(), rows, columns, weight.data_ptr(), outputs, out.data_ptr())
    return out
