"""The wire row: one token's quantized activations and routing, packed for a single gather.

A row holds, in this order, `x` as e2m1 pairs (H/2 bytes), its e4m3 block scales in linear order (H/16),
`topk_ids` int32 (4 bytes each) and `topk_weights` fp32 (4 bytes each), little-endian. The ids start at a
multiple of 4, the row ends at a multiple of 16, and every byte of padding is zero.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nibble.kernels.torch.nvfp4 import BLOCK_SIZE, quantize_nvfp4

_ROW_ALIGNMENT = 16


@dataclass(frozen=True)
class WireRowLayout:
    """Byte offsets of the fields in a wire row, for `hidden_size` values and `top_k` experts a token."""

    hidden_size: int
    top_k: int
    scale_offset: int = field(init=False)
    ids_offset: int = field(init=False)
    weights_offset: int = field(init=False)
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        if self.hidden_size < BLOCK_SIZE or self.hidden_size % BLOCK_SIZE:
            raise ValueError(
                f"hidden_size must be a positive multiple of {BLOCK_SIZE}, the NVFP4 block, "
                f"got {self.hidden_size}; gather BF16 for this model"
            )
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        scale_offset = self.hidden_size // 2
        ids_offset = _align(scale_offset + self.hidden_size // BLOCK_SIZE, 4)
        weights_offset = ids_offset + 4 * self.top_k
        row_bytes = _align(weights_offset + 4 * self.top_k, _ROW_ALIGNMENT)
        # Computed once: every layer of every step asks for them.
        for name, value in (
            ("scale_offset", scale_offset),
            ("ids_offset", ids_offset),
            ("weights_offset", weights_offset),
            ("row_bytes", row_bytes),
        ):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, eq=False)
class UnpackedRows:
    """The fields of T wire rows: views, so writing to one writes the rows."""

    x_fp4: Tensor  # uint8 [T, H/2]
    x_scale: Tensor  # float8_e4m3fn [T, H/16]
    topk_ids: Tensor  # int32 [T, K]
    topk_weights: Tensor  # fp32 [T, K]
    out: Tensor | None = None
    """Where the experts' results belong if not in a new tensor: bf16 [T, H], or FP8 rows, uint8 [T, row_bytes]."""


def quantize_pack(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, input_scale: Tensor) -> Tensor:
    """Quantizes `x` [T, H] (fp32 or bf16) with `quantize_nvfp4` and packs it with its routing.

    `topk_ids` int32 [T, K], `topk_weights` fp32 [T, K], `input_scale` fp32 scalar, the same on every rank.
    Returns uint8 [T, row_bytes]; no rows give an empty buffer of that width. Raises ValueError when H is not
    a multiple of 16.
    """
    layout = WireRowLayout(hidden_size=x.shape[1], top_k=topk_ids.shape[1])
    rows = x.new_zeros(x.shape[0], layout.row_bytes, dtype=torch.uint8)
    if x.shape[0] == 0:
        return rows
    fields = unpack(rows, layout)
    packed, scales = quantize_nvfp4(x, input_scale)
    fields.x_fp4.copy_(packed)
    fields.x_scale.copy_(scales)
    fields.topk_ids.copy_(topk_ids)
    fields.topk_weights.copy_(topk_weights)
    return rows


def unpack(rows: Tensor, layout: WireRowLayout) -> UnpackedRows:
    """The fields of `rows` (uint8 [T, row_bytes], contiguous), without copying. Zero rows give empty fields."""
    if rows.shape[1] != layout.row_bytes:
        raise ValueError(
            f"rows of {rows.shape[1]} bytes do not fit the layout of {layout.row_bytes} bytes "
            f"(hidden_size {layout.hidden_size}, top_k {layout.top_k})"
        )
    scale_end = layout.scale_offset + layout.hidden_size // BLOCK_SIZE
    weights_end = layout.weights_offset + 4 * layout.top_k
    return UnpackedRows(
        x_fp4=rows[:, : layout.scale_offset],
        x_scale=rows[:, layout.scale_offset : scale_end].view(torch.float8_e4m3fn),
        topk_ids=rows[:, layout.ids_offset : layout.weights_offset].view(torch.int32),
        topk_weights=rows[:, layout.weights_offset : weights_end].view(torch.float32),
    )


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
