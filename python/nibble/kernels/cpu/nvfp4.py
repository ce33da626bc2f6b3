"""NVFP4 quantizer, linear layer and experts in C."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.kernels.cpu.library import address, c_kernels
from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.torch.nvfp4 import BLOCK_SIZE
from nibble.kernels.torch.wire_row import WireRowLayout

_TILE = 16  # LANES in vector.h


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """Matrices `[E, N, K]` in tiles of 16 outputs, N rounded up to whole tiles; see nvfp4.c."""

    codes: Tensor  # uint8 [E, N/16, K/16, 2, 16, 4], two codes a byte
    scales: Tensor  # bf16 [E, N/16, K/16, 16], a quarter of the e4m3 scale

    @classmethod
    def from_checkpoint(cls, values: Tensor, scales: Tensor) -> "TiledWeight":
        """From packed e2m1, uint8 [E, N, K/2], and e4m3 scales [E, N, K/16]."""
        experts, rows, _ = values.shape
        blocks, padding = scales.shape[-1], -rows % _TILE
        values = torch.nn.functional.pad(values, (0, 0, 0, padding))
        quarter = torch.nn.functional.pad(scales.float() / 4, (0, 0, 0, padding)).to(torch.bfloat16)
        codes = torch.stack([values & 15, values >> 4], dim=-1)  # [E, N, K/2, 2]
        # Four columns of an output lie together, and those of 16 outputs after each other.
        groups = codes.view(experts, -1, _TILE, blocks, 4, 4).permute(0, 1, 3, 4, 2, 5)  # [E, tile, block, group, N, 4]
        return cls(
            (groups[:, :, :, 0::2] | groups[:, :, :, 1::2] << 4).contiguous(),
            quarter.view(experts, -1, _TILE, blocks).transpose(2, 3).contiguous(),
        )


def quantize_pack(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, input_scale: Tensor) -> Tensor:
    """`kernels.torch.wire_row.quantize_pack`, bit for bit."""
    layout = WireRowLayout(hidden_size=x.shape[1], top_k=topk_ids.shape[1])
    rows = len(x)
    out = torch.empty(rows, layout.row_bytes, dtype=torch.uint8)
    x, topk_ids, topk_weights = x.float().contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
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
        self.weight = TiledWeight.from_checkpoint(values[None], scales[None])
        self.input_scale, self.alpha = float(input_scale), alpha

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        x = x.float().contiguous()
        out = torch.empty(rows, len(self.alpha))
        codes, scales = (ctypes.c_uint8 * (rows * columns))(), (ctypes.c_float * (rows * columns // BLOCK_SIZE))()
        library = c_kernels()
        library.quantize_rows(address(x), rows, columns, self.input_scale, codes, scales)
        library.matmul_nvfp4(
            codes, scales, rows, columns, address(self.weight.codes), address(self.weight.scales),
            address(self.alpha), len(self.alpha), (ctypes.c_void_p * (2 * rows))(), address(out),
        )  # fmt: skip
        return out


class Nvfp4MoE:
    """The experts `first_expert`, … of a layer; see `kernels.torch.fused_moe.fused_moe_nvfp4`."""

    def __init__(self, packed: PackedNvfp4Experts, first_expert: int) -> None:
        self.num_experts, self.hidden, self.width = len(packed.w2), packed.w2.shape[1], 2 * packed.w2.shape[2]
        self.w13 = TiledWeight.from_checkpoint(packed.w13, packed.w13_scales)
        self.w2 = TiledWeight.from_checkpoint(packed.w2, packed.w2_scales)
        self.first_expert = first_expert
        self.g1_gate_up = packed.g1_gate_up.contiguous()
        self.w2_input_scale, self.g2 = packed.w2_input_scale.contiguous(), packed.g2.contiguous()

    def __call__(self, x_fp4: Tensor, x_scale: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        rows, top_k = topk_ids.shape
        hidden, width = self.hidden, self.width
        out = torch.zeros(rows, hidden)
        codes, scales = (ctypes.c_uint8 * (rows * hidden))(), (ctypes.c_float * (rows * hidden // BLOCK_SIZE))()
        library = c_kernels()
        library.decode_rows(
            address(x_fp4), x_fp4.stride(0), address(x_scale), x_scale.stride(0), rows, hidden, codes, scales
        )
        library.fused_moe_nvfp4(
            codes, scales, address(topk_ids), topk_ids.stride(0), address(topk_weights), topk_weights.stride(0),
            rows, hidden, width, top_k, self.first_expert, self.num_experts,
            address(self.w13.codes), address(self.w13.scales), address(self.w2.codes), address(self.w2.scales),
            address(self.g1_gate_up), address(self.w2_input_scale), address(self.g2),
            (ctypes.c_void_p * (5 * rows))(), (ctypes.c_uint8 * (rows * width))(),
            (ctypes.c_float * (rows * (width // BLOCK_SIZE + 1)))(), address(out),
        )  # fmt: skip
        return out
