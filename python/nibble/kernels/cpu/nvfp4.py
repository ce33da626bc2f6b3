"""NVFP4 quantizer, linear layer and experts in C."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from nibble.kernels.cpu.library import as_fp32, c_kernels
from nibble.kernels.torch.fp8_row import leave_result
from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.torch.wire_row import WireRowLayout

_TILE = 16  # LANES in vector.h
_layout = functools.cache(WireRowLayout)


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
    rows, hidden_size = x.shape
    layout = _layout(hidden_size, topk_ids.shape[1])
    out = torch.empty(rows, layout.row_bytes, dtype=torch.uint8)
    x, topk_ids, topk_weights = as_fp32(x), topk_ids.contiguous(), topk_weights.contiguous()
    if rows == 0:
        return out
    c_kernels().quantize_pack(
        x.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr(), rows, layout.hidden_size, layout.top_k,
        float(input_scale), layout.scale_offset, layout.ids_offset, layout.weights_offset, layout.row_bytes,
        out.data_ptr(),
    )  # fmt: skip
    return out


class Nvfp4Linear:
    """`fake_quantize(x) @ weight.T * alpha`: `x [T, K]`, `alpha` fp32 [N], result fp32 [T, N]."""

    def __init__(self, values: Tensor, scales: Tensor, input_scale: Tensor, alpha: Tensor) -> None:
        """`values` uint8 [N, K/2] and `scales` e4m3 [N, K/16] as in the checkpoint."""
        self.weight = TiledWeight.from_checkpoint(values[None], scales[None])
        self.alpha, self.outputs = alpha.contiguous(), len(alpha)
        self._weight = float(input_scale), *(x.data_ptr() for x in (self.weight.codes, self.weight.scales, self.alpha))

    def __call__(self, x: Tensor) -> Tensor:
        rows, columns = x.shape
        x = as_fp32(x)
        out = torch.empty(rows, self.outputs)
        if rows:
            c_kernels().linear_nvfp4(x.data_ptr(), rows, columns, *self._weight, self.outputs, out.data_ptr())
        return out


class Nvfp4MoE:
    """The experts `first_expert`, … of a layer; see `kernels.torch.fused_moe.fused_moe_nvfp4`."""

    def __init__(self, packed: PackedNvfp4Experts, first_expert: int, num_experts: int | None = None) -> None:
        self.w13 = TiledWeight.from_checkpoint(packed.w13, packed.w13_scales)
        self.w2 = TiledWeight.from_checkpoint(packed.w2, packed.w2_scales)
        self.scales = [scale.contiguous() for scale in (packed.g1_gate_up, packed.w2_input_scale, packed.g2)]
        self.hidden, self.width = packed.w2.shape[1], 2 * packed.w2.shape[2]
        weights = (self.w13.codes, self.w13.scales, self.w2.codes, self.w2.scales, *self.scales)
        self._experts = first_expert, len(packed.w2), *(x.data_ptr() for x in weights)

    def __call__(
        self, x_fp4: Tensor, x_scale: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        rows, top_k = topk_ids.shape
        result = torch.empty(rows, self.hidden)
        c_kernels().fused_moe_nvfp4(
            x_fp4.data_ptr(), x_fp4.stride(0), x_scale.data_ptr(), x_scale.stride(0),
            topk_ids.data_ptr(), topk_ids.stride(0), topk_weights.data_ptr(), topk_weights.stride(0),
            rows, self.hidden, self.width, top_k, *self._experts, result.data_ptr(),
        )  # fmt: skip
        return result if out is None else leave_result(result, out)
