"""The greedy choice in C."""

import torch
from torch import Tensor

from nibble.kernels.cpu.library import as_fp32, c_kernels


def argmax(logits: Tensor) -> Tensor:
    """`kernels.torch.sampling.argmax`; of equal tokens the first."""
    logits = as_fp32(logits)
    rows, columns = logits.shape
    out = torch.empty(rows, dtype=torch.int64)
    c_kernels().argmax(logits.data_ptr(), rows, columns, out.data_ptr())
    return out
