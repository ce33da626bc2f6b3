"""Which implementation of each kernel runs. `config.resolve` decides the names, this module finds the functions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor, dtype

from nibble.kernels.torch.fused_moe import PackedNvfp4Experts

Matmul = Callable[[Tensor], Tensor]
"""`x [T, K]` to [T, N], fp32 or bf16."""
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""`x_fp4 [S, H/2], x_scale [S, H/16], topk_ids [S, K], topk_weights [S, K]` to [S, H], fp32 or bf16: a new tensor, or
the last argument, bf16, or uint8 for FP8 rows.
"""


@dataclass(frozen=True)
class Kernels:
    """The functions of one machine. Their contracts are those of the torch implementations."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    qk_norm_rope: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rope_latent: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    topk_softmax: Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]
    grouped_topk: Callable[[Tensor, Tensor | None, int, int, int, bool, float], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    argmax: Callable[[Tensor], Tensor]
    quantize_pack: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    quantize_fp8_rows: Callable[[Tensor, Tensor | None], Tensor]
    sum_fp8_rows: Callable[[Tensor, int, int, dtype], Tensor]
    nvfp4_linear: Callable[[Tensor, Tensor, Tensor, Tensor], Matmul]
    nvfp4_moe: Callable[[PackedNvfp4Experts, int, int], Experts]
    """From this rank's experts, the first one's number, and how many the layer has on all ranks."""


@cache
def select_kernels(kernels: str, moe_kernel: str) -> Kernels:
    """`kernels` is "c", "torch", "triton" or "flashinfer"; `moe_kernel` one of the first three, or
    "flashinfer_cutlass".
    """
    sets = {
        "c": _c_kernels,
        "torch": _torch_kernels,
        "triton": _triton_kernels,
        "flashinfer": _flashinfer_kernels,
        "flashinfer_cutlass": _flashinfer_cutlass_kernels,
    }
    return replace(sets[kernels](), nvfp4_moe=sets[moe_kernel]().nvfp4_moe)


def _torch_kernels() -> Kernels:
    from torch.nn.functional import linear

    from nibble.kernels.torch.activation import silu_and_mul
    from nibble.kernels.torch.fp8_row import quantize_fp8_rows, sum_fp8_rows
    from nibble.kernels.torch.fused_moe import Nvfp4MoE
    from nibble.kernels.torch.latent import rope_latent
    from nibble.kernels.torch.norm import add_rms_norm, qk_norm_rope, rms_norm
    from nibble.kernels.torch.nvfp4_linear import Nvfp4Linear
    from nibble.kernels.torch.sampling import argmax
    from nibble.kernels.torch.topk import grouped_topk, topk_softmax
    from nibble.kernels.torch.wire_row import quantize_pack

    return Kernels(
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        silu_and_mul=silu_and_mul,
        qk_norm_rope=qk_norm_rope,
        rope_latent=rope_latent,
        topk_softmax=topk_softmax,
        grouped_topk=grouped_topk,
        linear=linear,
        argmax=argmax,
        quantize_pack=quantize_pack,
        quantize_fp8_rows=quantize_fp8_rows,
        sum_fp8_rows=sum_fp8_rows,
        nvfp4_linear=Nvfp4Linear,
        nvfp4_moe=Nvfp4MoE,
    )


def _c_kernels() -> Kernels:
    """Torch's own where they take little of a step's time."""
    from nibble.kernels.cpu.linear import linear
    from nibble.kernels.cpu.norm import add_rms_norm, qk_norm_rope, rms_norm
    from nibble.kernels.cpu.nvfp4 import Nvfp4Linear, Nvfp4MoE, quantize_pack
    from nibble.kernels.cpu.sampling import argmax
    from nibble.kernels.cpu.topk import topk_softmax

    return replace(
        _torch_kernels(),
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        qk_norm_rope=qk_norm_rope,
        topk_softmax=topk_softmax,
        linear=linear,
        argmax=argmax,
        quantize_pack=quantize_pack,
        nvfp4_linear=Nvfp4Linear,
        nvfp4_moe=Nvfp4MoE,
    )


def _triton_kernels() -> Kernels:
    """Torch's own where they are as good as a kernel of ours would be."""
    from nibble.kernels.triton.compile_once import compile_once
    from nibble.kernels.triton.fp8_row import quantize_fp8_rows, sum_fp8_rows
    from nibble.kernels.triton.fused_moe import Nvfp4MoE
    from nibble.kernels.triton.latent import rope_latent
    from nibble.kernels.triton.norm import qk_norm_rope
    from nibble.kernels.triton.nvfp4_linear import Nvfp4Linear
    from nibble.kernels.triton.topk import grouped_topk, topk_softmax
    from nibble.kernels.triton.wire_row import quantize_pack

    compile_once()
    return replace(
        _torch_kernels(),
        qk_norm_rope=qk_norm_rope,
        rope_latent=rope_latent,
        topk_softmax=topk_softmax,
        grouped_topk=grouped_topk,
        quantize_pack=quantize_pack,
        quantize_fp8_rows=quantize_fp8_rows,
        sum_fp8_rows=sum_fp8_rows,
        nvfp4_linear=Nvfp4Linear,
        nvfp4_moe=Nvfp4MoE,
    )


def _flashinfer_kernels() -> Kernels:
    from nibble.kernels.flashinfer.norm import add_rms_norm, rms_norm, silu_and_mul

    return replace(_triton_kernels(), rms_norm=rms_norm, add_rms_norm=add_rms_norm, silu_and_mul=silu_and_mul)


def _flashinfer_cutlass_kernels() -> Kernels:
    from nibble.kernels.flashinfer.cutlass_moe import CutlassNvfp4MoE

    return replace(_triton_kernels(), nvfp4_moe=CutlassNvfp4MoE)
