"""The FP8 row: an expert rank's partial result of one token, quantized to go back to the rank whose token it is.

A row holds, in this order, H values as e4m3, one byte each, and the scales of their groups of 128 (the last may be
smaller) as fp32, little-endian. The scales start at a multiple of 4 and the row ends at a multiple of 16; bytes of
padding are never read.

A group's scale is the smallest power of two, at least 2^-126, by which its values divided are at most 448, the largest
e4m3 number. So scaling is exact both ways: only the values are rounded, to nearest, ties to even, and a sum of terms is
the same bits however multiplications and additions are fused. Of a group with a value that is not finite the scale is
NaN, and all its values come back as that.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZE = 128
_ROW_ALIGNMENT = 16
INFINITY = 0x7F800000  # bits of fp32
# With m the mantissa of the largest value 1.m * 2^e, adding this carries into the exponent if 1.m exceeds 1.75. The
# largest e4m3 number is 1.75 * 2^8.
ABOVE_448 = 0x7FFFFF - 0x600000
EXPONENT_448 = 8


@dataclass(frozen=True)
class Fp8RowLayout:
    """Byte offsets of the fields in an FP8 row of `hidden_size` values."""

    hidden_size: int
    num_groups: int = field(init=False)
    scale_offset: int = field(init=False)
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        num_groups = -(-self.hidden_size // GROUP_SIZE)
        scale_offset = _align(self.hidden_size, 4)
        # Computed once: every layer of every step asks for them.
        object.__setattr__(self, "num_groups", num_groups)
        object.__setattr__(self, "scale_offset", scale_offset)
        object.__setattr__(self, "row_bytes", _align(scale_offset + 4 * num_groups, _ROW_ALIGNMENT))


def quantize_fp8_rows(x: Tensor, out: Tensor | None = None) -> Tensor:
    """FP8 rows of `x` [T, H] (fp32 or bf16): uint8 [T, row_bytes], `out` if given. No rows give an empty buffer."""
    layout = Fp8RowLayout(x.shape[1])
    if out is None:
        out = x.new_empty(x.shape[0], layout.row_bytes, dtype=torch.uint8)
    values, scales = _fields(out, layout)
    groups = F.pad(x.float(), (0, -x.shape[1] % GROUP_SIZE)).unflatten(1, (layout.num_groups, GROUP_SIZE))
    # As integers, magnitudes are ordered like the numbers, with NaN above infinity.
    largest = (groups.view(torch.int32) & 0x7FFFFFFF).amax(2, keepdim=True)  # [T, G, 1]
    exponent = (((largest + ABOVE_448) >> 23) - EXPONENT_448).clamp_min(1)  # biased
    scale = (exponent << 23).view(torch.float32).masked_fill(largest >= INFINITY, torch.nan)
    reciprocal = ((254 - exponent) << 23).view(torch.float32)
    values.copy_((groups * reciprocal).flatten(1)[:, : layout.hidden_size].to(torch.float8_e4m3fn))
    scales.copy_(scale.squeeze(2))
    return out


def dequantize_fp8_rows(rows: Tensor, hidden_size: int) -> Tensor:
    """The values of FP8 `rows` [T, row_bytes], exact in fp32 [T, H]."""
    values, scales = _fields(rows, Fp8RowLayout(hidden_size))
    return values.float() * scales.repeat_interleave(GROUP_SIZE, dim=1)[:, :hidden_size]


def sum_fp8_rows(terms: Tensor, num_terms: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """The sums of T rows over `num_terms` ranks: `dtype` [T, H], fp32 or bf16.

    `terms` are FP8 rows, uint8 [num_terms * T, row_bytes]: the T rows of each rank, by rank. They are added in fp32 in
    the order of the ranks, and the sum is rounded once.
    """
    values = dequantize_fp8_rows(terms, hidden_size).view(num_terms, terms.shape[0] // num_terms, hidden_size)
    total = values[0]
    for term in values[1:]:
        total += term
    return total.to(dtype)


def leave_result(result: Tensor, out: Tensor) -> Tensor:
    """Leaves experts' `result` [S, H] in `out`, which it returns: bf16 [S, H], or FP8 rows, uint8 [S, row_bytes]."""
    return quantize_fp8_rows(result, out) if out.dtype == torch.uint8 else out.copy_(result)


def _fields(rows: Tensor, layout: Fp8RowLayout) -> tuple[Tensor, Tensor]:
    """Values e4m3 [T, H] and scales fp32 [T, G]: views."""
    if rows.shape[1] != layout.row_bytes:
        raise ValueError(
            f"rows of {rows.shape[1]} bytes do not fit the layout of {layout.row_bytes} bytes "
            f"(hidden_size {layout.hidden_size})"
        )
    scale_end = layout.scale_offset + 4 * layout.num_groups
    return (
        rows[:, : layout.hidden_size].view(torch.float8_e4m3fn),
        rows[:, layout.scale_offset : scale_end].view(torch.float32),
    )


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
