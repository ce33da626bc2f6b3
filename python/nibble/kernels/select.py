"""Which implementation of each kernel runs. `config.resolve` decides the names, this module finds the functions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor

from nibble.kernels.torch.fused_moe import PackedNvfp4Experts

Matmul = Callable[[Tensor], Tensor]
"""`x [T, K]` to fp32 [T, N]."""
Experts = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`x_fp4 [S, H/2], x_scale [S, H/16], topk_ids [S, K], topk_weights [S, K]` to fp32 [S, H]."""


@dataclass(frozen=True)
class Kernels:
    """The functions of one machine. Their contracts are those of the torch implementations."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    qk_norm_rope: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    topk_softmax: Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    argmax: Callable[[Tensor], Tensor]
    quantize_pack: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    nvfp4_linear: Callable[[Tensor, Tensor, Tensor, Tensor], Matmul]
    nvfp4_moe: Callable[[PackedNvfp4Experts, int], Experts]


@cache
def select_kernels(cpu_kernels: str, moe_kernel: str) -> Kernels:
    """`cpu_kernels` and `moe_kernel` are "c" or "torch"."""
    moe = _c_kernels() if moe_kernel == "c" else _torch_kernels()
    rest = _c_kernels() if cpu_kernels == "c" else _torch_kernels()
    return replace(rest, nvfp4_moe=moe.nvfp4_moe)


def _torch_kernels() -> Kernels:
    from torch.nn.functional import linear

    from nibble.kernels.torch.fused_moe import Nvfp4MoE
    from nibble.kernels.torch.norm import add_rms_norm, qk_norm_rope, rms_norm
    from nibble.kernels.torch.nvfp4_linear import Nvfp4Linear
    from nibble.kernels.torch.sampling import argmax
    from nibble.kernels.torch.topk import topk_softmax
    from nibble.kernels.torch.wire_row import quantize_pack

    return Kernels(
        rms_norm, add_rms_norm, qk_norm_rope, topk_softmax, linear, argmax, quantize_pack, Nvfp4Linear, Nvfp4MoE
    )


def _c_kernels() -> Kernels:
    from nibble.kernels.cpu.linear import linear
    from nibble.kernels.cpu.norm import add_rms_norm, qk_norm_rope, rms_norm
    from nibble.kernels.cpu.nvfp4 import Nvfp4Linear, Nvfp4MoE, quantize_pack
    from nibble.kernels.cpu.sampling import argmax
    from nibble.kernels.cpu.topk import topk_softmax

    return Kernels(
        rms_norm, add_rms_norm, qk_norm_rope, topk_softmax, linear, argmax, quantize_pack, Nvfp4Linear, Nvfp4MoE
    )
