"""Normalization in C."""

import torch
from torch import Tensor

from nibble.kernels.cpu.library import c_kernels
from nibble.kernels.torch import norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.torch.norm.rms_norm` for `x [T, H]`; the result is contiguous."""
    if x.dtype != torch.float32 or x.stride(1) != 1:
        return norm.rms_norm(x, weight, eps)
    rows, columns = x.shape
    out = torch.empty(rows, columns)
    if rows:
        c_kernels().rms_norm(x.data_ptr(), rows, x.stride(0), columns, weight.data_ptr(), eps, out.data_ptr())
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.torch.norm.add_rms_norm`."""
    is_plain = x.dtype == residual.dtype == torch.float32 and x.is_contiguous() and residual.is_contiguous()
    if not is_plain:
        return norm.add_rms_norm(x, residual, weight, eps)
    rows, columns = x.shape
    out, total = torch.empty(rows, columns), torch.empty(rows, columns)
    if rows:
        c_kernels().add_rms_norm(
            x.data_ptr(), residual.data_ptr(), rows, columns, weight.data_ptr(), eps, out.data_ptr(), total.data_ptr()
        )
    return out, total


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """`kernels.torch.norm.qk_norm_rope` for parts of one tensor, in which heads of a row lie after each other."""
    (rows, heads, size), kv_heads = q.shape, k.shape[1]
    strides = (q.stride(0), size, 1)
    if q.dtype != torch.float32 or q.stride() != strides or k.stride() != strides or size % 2:
        return norm.qk_norm_rope(q, k, q_weight, k_weight, eps, positions, cos, sin)
    q_out, k_out = torch.empty(rows, heads, size), torch.empty(rows, kv_heads, size)
    c_kernels().qk_norm_rope(
        q.data_ptr(), k.data_ptr(), rows, strides[0], heads, kv_heads, size,
        q_weight.data_ptr(), k_weight.data_ptr(), eps,
        positions.data_ptr(), cos.data_ptr(), sin.data_ptr(), q_out.data_ptr(), k_out.data_ptr(),
    )  # fmt: skip
    return q_out, k_out
