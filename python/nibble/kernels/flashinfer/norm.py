"""Normalization and the gated activation through FlashInfer, which compiles them on first use."""

from flashinfer import activation, norm  # type: ignore[import-not-found]
from torch import Tensor

from nibble.kernels.torch.activation import silu_and_mul as torch_silu_and_mul


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`kernels.torch.norm.rms_norm` for `x [T, H]`; no rows launch nothing."""
    return norm.rmsnorm(x, weight, eps) if x.shape[0] else x


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`kernels.torch.norm.add_rms_norm`, in place: the results are `x` and `residual` themselves."""
    if x.shape[0]:
        norm.fused_add_rmsnorm(x, residual, weight, eps)
    return x, residual


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`kernels.torch.activation.silu_and_mul`; widths that no 16-byte access fits are left to torch."""
    if gate_up.shape[0] == 0 or gate_up.shape[1] * gate_up.itemsize % 32:
        return torch_silu_and_mul(gate_up)
    return activation.silu_and_mul(gate_up)
