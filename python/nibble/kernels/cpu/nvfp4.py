"""NVFP4 quantizer, linear layer and experts in C. Small batches run here, large ones where matrix products are fast."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.kernels.cpu.library import address, c_kernels
from nibble.kernels.torch import fused_moe as torch_moe
from nibble.kernels.torch import wire_row
from nibble.kernels.torch.nvfp4 import BLOCK_SIZE, dequantize_nvfp4, fake_quantize_nvfp4
from nibble.kernels.torch.wire_row import WireRowLayout

MAX_MATMUL_ROWS = 64
"""Rows up to which the C loops, which read a quarter of the bytes, are faster than a library's matrix product."""
MAX_EXPERT_ROWS = 256
"""The same for all rows of an experts' call, a few of which go to each expert."""

_TILE = 4  # OUTPUTS in kernels.c


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """`codes` int8 [..., N, K], twice e2m1; `scales` fp32 [..., N, K/16], half the e4m3 scale."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def from_checkpoint(cls, values: Tensor, scales: Tensor) -> "CodedWeight":
        """From packed e2m1, uint8 [..., N, K/2], and e4m3 scales [..., N, K/16]."""
        rows = values.reshape(-1, values.shape[-1])
        ones = torch.ones(len(rows), scales.shape[-1]).to(torch.float8_e4m3fn)
        codes = (2 * dequantize_nvfp4(rows, ones)).to(torch.int8)
        return cls(codes.view(*values.shape[:-1], -1), scales.float() / 2)


def quantize_pack(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, input_scale: Tensor) -> Tensor:
    """`kernels.torch.wire_row.quantize_pack`, bit for bit."""
    layout = WireRowLayout(hidden_size=x.shape[1], top_k=topk_ids.shape[1])
    rows = len(x)
    if x.dtype != torch.float32:
        return wire_row.quantize_pack(x, topk_ids, topk_weights, input_scale)
    out = torch.empty(rows, layout.row_bytes, dtype=torch.uint8)
    x, topk_ids, topk_weights = x.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    c_kernels().quantize_pack(
        address(x), address(topk_ids), address(topk_weights), rows, layout.hidden_size, layout.top_k,
        float(input_scale), layout.scale_offset, layout.ids_offset, layout.weights_offset, layout.row_bytes,
        address(out),
    )  # fmt: skip
    return out


class Nvfp4Linear:
    """`fake_quantize(x) @ weight.T * alpha`: `x [T, K]`, `alpha` fp32 [N], result fp32 [T, N]."""

    def __init__(self, values: Tensor, scales: Tensor, input_scale: Tensor, alpha: Tensor) -> None:
        """`values` uint8 [N, K/2] and `scales` e4m3 [N, K/16] as in the checkpoint."""
        self.coded = CodedWeight.from_checkpoint(values, scales)
        self.weight = dequantize_nvfp4(values, scales)
        self.input_scale, self.input_scale_value, self.alpha = input_scale, float(input_scale), alpha

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        if x.dtype != torch.float32:
            return (fake_quantize_nvfp4(x, self.input_scale) @ self.weight.t()).mul_(self.alpha)
        x = x.contiguous()
        quantized = torch.empty_like(x)
        library = c_kernels()
        library.fake_quantize_nvfp4(address(x), rows, columns, self.input_scale_value, address(quantized))
        if rows > MAX_MATMUL_ROWS or len(self.alpha) % _TILE:
            return (quantized @ self.weight.t()).mul_(self.alpha)
        out = torch.empty(rows, len(self.alpha))
        pointers, scratch = _scratch(rows, _TILE * rows)
        library.matmul_nvfp4(
            address(quantized), rows, columns, address(self.coded.codes), address(self.coded.scales),
            address(self.alpha), len(self.alpha), pointers, address(scratch), address(out),
        )  # fmt: skip
        return out


class Nvfp4MoE:
    """The experts `first_expert`, … of a layer; see `kernels.torch.fused_moe.fused_moe_nvfp4`."""

    def __init__(self, packed: torch_moe.PackedNvfp4Experts, first_expert: int) -> None:
        self.w13 = CodedWeight.from_checkpoint(packed.w13, packed.w13_scales)
        self.w2 = CodedWeight.from_checkpoint(packed.w2, packed.w2_scales)
        self.large = torch_moe.Nvfp4MoE(packed, first_expert)
        self.first_expert = first_expert
        self.g1_gate_up = packed.g1_gate_up.contiguous()
        self.w2_input_scale, self.g2 = packed.w2_input_scale, packed.g2

    def __call__(self, x_fp4: Tensor, x_scale: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        rows, top_k = topk_ids.shape
        if rows > MAX_EXPERT_ROWS:
            return self.large(x_fp4, x_scale, topk_ids, topk_weights)
        num_experts, hidden, width = self.w2.codes.shape
        x, out = torch.empty(rows, hidden), torch.zeros(rows, hidden)
        if rows == 0:
            return out
        library = c_kernels()
        library.dequantize_nvfp4(
            address(x_fp4), x_fp4.stride(0), address(x_scale), x_scale.stride(0), rows, hidden, address(x)
        )
        pointers, scratch = _scratch(2 * rows, rows * (2 * width + 1 + _TILE))
        library.fused_moe_nvfp4(
            address(x), address(topk_ids), topk_ids.stride(0), address(topk_weights), topk_weights.stride(0),
            rows, hidden, width, top_k, self.first_expert, num_experts,
            address(self.w13.codes), address(self.w13.scales), address(self.w2.codes), address(self.w2.scales),
            address(self.g1_gate_up), address(self.w2_input_scale), address(self.g2),
            pointers, address(scratch), address(out),
        )  # fmt: skip
        return out


def _scratch(pointers: int, floats: int) -> tuple["ctypes.Array[ctypes.c_void_p]", Tensor]:
    return (ctypes.c_void_p * pointers)(), torch.empty(floats)


assert BLOCK_SIZE == 16  # kernels.c has it written out
