"""Unquantized linear layers on a CPU: small ones in C, such as a router on a decoding batch.

C sums every result in the same order however many rows come along, so a token's experts do not depend on its company
there. A library's product may differ in the last bit; it is the faster one, by microseconds where C is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.kernels.cpu.library import c_kernels

_MAX_RESULTS = 8192
"""Outputs times rows up to which that order is worth its time; prompts go to the library."""


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
