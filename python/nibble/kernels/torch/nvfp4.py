"""NVFP4 arithmetic in plain torch: the CPU backend, and the oracle of every faster kernel.

NVFP4 stores a value as e2m1 (magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6), one e4m3 scale for every 16 values of a
row and one fp32 scale for a tensor: ``x ~ e2m1 * e4m3 * fp32``. Two e2m1 codes share a byte, the even index
in the low nibble.

The contract of quantization, which a kernel has to reproduce bit for bit. Every step is one fp32 operation
rounded to nearest even (IEEE division, no reciprocals). For a block of 16 values ``x`` and
``s = input_scale`` (finite, positive):

1. ``m = max(|x|)``, NaN if any value is NaN;
2. ``sf = e4m3(min(m / (6 * s), 448))``, rounded to nearest even;
3. ``d = sf * s``, or +inf where that is 0;
4. ``y = clamp(x / d, -6, 6)``;
5. ``code = e2m1(y)``, nearest, ties to the even mantissa; the sign is the sign bit of ``y``, also for zero.

So a block too small for its scale becomes zeros, infinities saturate, and a NaN makes its own block's scale
NaN (byte 0x7F, with sixteen codes of 0): exactly that block dequantizes to NaN. Blocks never depend on each
other, hence neither do rows.

Steps 2 to 4 are those of nvidia-modelopt (`NVFP4QTensor`, and `fp8_quantize_scale` with `nvfp4_scalar_quant`
for activations), which calibrates the checkpoints.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0

# Magnitude of the codes 0 to 7; code + 8 is the negative.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SWIZZLE_ROWS = 128
_SWIZZLE_COLUMNS = 4

# Torch wraps a Python integer into a new tensor at each use; at decode sizes that costs more than the operation.
_EXPONENT_MASK = torch.tensor(0x7F800000, dtype=torch.int32)
_PAIR_MULTIPLIER = torch.tensor((1 << 13) + 1, dtype=torch.int32)
_PAIR_SHIFT = torch.tensor(22, dtype=torch.int32)
_PAIR_MASK = torch.tensor(0x3FF, dtype=torch.int32)


def quantize_nvfp4(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes `x` [T, K] (fp32 or bf16) with the contract at the top of this file.

    `input_scale` is fp32, a scalar or [T, 1]. Returns the packed codes, uint8 [T, K/2], and the block scales,
    float8_e4m3fn [T, K/16] in row-major ("linear") order. Zero rows give empty tensors of the right width.
    Raises ValueError when K is not a multiple of 16.
    """
    rows, columns = x.shape
    _check_columns(columns)
    if rows == 0:
        return x.new_empty(0, columns // 2, dtype=torch.uint8), x.new_empty(
            0, columns // BLOCK_SIZE, dtype=torch.float8_e4m3fn
        )
    x = x.float().contiguous()
    scales = _block_scales(x, input_scale)
    values = _round_to_e2m1(x, scales.float(), input_scale).nan_to_num_(nan=0.0)  # [T, K/16, 16]
    return _pack(values.view(rows, columns)), scales


def fake_quantize_nvfp4(x: Tensor, input_scale: Tensor) -> Tensor:
    """The values e2m1 * e4m3 of `x` [T, K], fp32 [T, K], without `input_scale`.

    Bit for bit ``dequantize_nvfp4(*quantize_nvfp4(x, input_scale))``, without making the codes.
    """
    rows, columns = x.shape
    _check_columns(columns)
    if rows == 0:
        return x.new_empty(0, columns, dtype=torch.float32)
    x = x.float().contiguous()
    scales = _block_scales(x, input_scale).float()
    return _round_to_e2m1(x, scales, input_scale).mul_(scales.unsqueeze(-1)).view(rows, columns)


def dequantize_nvfp4(
    packed: Tensor, scales: Tensor, global_scale: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The values e2m1 * e4m3, times `global_scale` if given, as `dtype` [T, K].

    `packed` is uint8 [T, K/2], `scales` float8_e4m3fn [T, K/16] (linear), `global_scale` fp32, a scalar or
    [T, 1]. Without `global_scale` the values are exact in fp32, bf16 and fp16: they have six significant bits.
    """
    rows, blocks = scales.shape
    if rows == 0:
        return scales.new_empty(0, blocks * BLOCK_SIZE, dtype=dtype)
    pairs = _byte_values(packed.device).index_select(0, packed.to(torch.int32).reshape(-1))
    values = pairs.view(torch.float32).view(rows, blocks, BLOCK_SIZE)
    values = values.mul_(scales.float().unsqueeze(-1)).view(rows, blocks * BLOCK_SIZE)
    if global_scale is not None:
        values.mul_(global_scale)
    return values.to(dtype)


def input_scale_from_amax(amax: Tensor) -> Tensor:
    """The fp32 scale that maps `amax` to the largest NVFP4 value: ``amax / (6 * 448)``.

    An `amax` of zero gives the smallest normal fp32 number, so that zeros stay zeros.
    """
    return (amax.float() / (E2M1_MAX * E4M3_MAX)).clamp_(min=torch.finfo(torch.float32).tiny)


def quantize_nvfp4_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes a weight [N, K] along K, as a ModelOpt checkpoint stores it.

    Returns `weight` uint8 [N, K/2], `weight_scale` float8_e4m3fn [N, K/16] and `weight_scale_2` fp32 scalar.
    The bytes are modelopt's, except in blocks too small for e4m3: modelopt raises their scale to 2^-9 (1 for a
    block of zeros), here they become zeros.
    """
    weight_scale_2 = input_scale_from_amax(weight.abs().amax())
    packed, scales = quantize_nvfp4(weight, weight_scale_2)
    return packed, scales, weight_scale_2


def swizzle_scales(scales: Tensor) -> Tensor:
    """Block scales [M, K/16] (one byte each) in the 128x4 tiles that tensor cores read.

    Rows are padded to 128 and columns to 4 with zeros; the result has the padded shape and the dtype of
    `scales`. With ``Kv = K/16``, element (m, k) lands at the flat offset ``(m/128) * ceil(Kv/4) * 512 +
    (k/4) * 512 + (m mod 32) * 16 + ((m mod 128)/32) * 4 + (k mod 4)`` (cuBLAS, "1D block scaling factors
    layout").
    """
    rows, columns = scales.shape
    row_tiles, column_tiles = _swizzle_tiles(rows, columns)
    padded = scales.new_zeros(row_tiles * _SWIZZLE_ROWS, column_tiles * _SWIZZLE_COLUMNS, dtype=torch.uint8)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.view(row_tiles, 4, 32, column_tiles, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)


def unswizzle_scales(swizzled: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle_scales`: the linear scales [rows, columns], without the padding."""
    row_tiles, column_tiles = _swizzle_tiles(rows, columns)
    tiles = swizzled.view(torch.uint8).view(row_tiles, column_tiles, 32, 4, 4)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles * _SWIZZLE_ROWS, column_tiles * _SWIZZLE_COLUMNS)
    return padded[:rows, :columns].contiguous().view(swizzled.dtype)


def _swizzle_tiles(rows: int, columns: int) -> tuple[int, int]:
    return math.ceil(rows / _SWIZZLE_ROWS), math.ceil(columns / _SWIZZLE_COLUMNS)


def _check_columns(columns: int) -> None:
    if columns % BLOCK_SIZE:
        raise ValueError(
            f"NVFP4 scales blocks of {BLOCK_SIZE} values, so the last dimension must be a multiple of "
            f"{BLOCK_SIZE}, got {columns}; pad it with zeros"
        )


def _block_scales(x: Tensor, input_scale: Tensor) -> Tensor:
    """Steps 1 and 2 of the contract: fp32 [T, K] to float8_e4m3fn [T, K/16]."""
    # Max pooling is the fastest reduction over 16 neighbours, and it keeps NaN.
    amax = F.max_pool1d(x.abs(), BLOCK_SIZE, BLOCK_SIZE)
    # Not every version of torch saturates in the cast; clamp does, and keeps NaN.
    return amax.div_(input_scale * E2M1_MAX).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)


def _round_to_e2m1(x: Tensor, scales: Tensor, input_scale: Tensor) -> Tensor:
    """Steps 3 to 5 of the contract: fp32 [T, K] and scales fp32 [T, K/16] to e2m1 values, fp32 [T, K/16, 16].

    Where the scale is NaN so are the values.
    """
    x = x.view(*scales.shape, BLOCK_SIZE)
    divisor = F.threshold(scales * input_scale, 0.0, math.inf)  # infinite where not positive, but NaN stays
    y = torch.div(x, divisor.unsqueeze(-1)).clamp_(-E2M1_MAX, E2M1_MAX)
    # With e the exponent of |y|, at least 0, e2m1 is spaced by 2^(e-1) around y. So is fp32 around
    # 1.5 * 2^22 * 2^e: adding and subtracting that number rounds to nearest even, and loses the sign of zero.
    power = torch.bitwise_and(y.view(torch.int32), _EXPONENT_MASK).view(torch.float32).clamp_(min=1.0)
    rounder = 1.5 * 2.0**22
    return y.add_(power, alpha=rounder).sub_(power, alpha=rounder).copysign_(x)


def _pack(values: Tensor) -> Tensor:
    """e2m1 values, fp32 [T, K], to their codes, uint8 [T, K/2]."""
    # 2^-14 is the least normal fp16 number: scaled by it, e2m1's exponent and mantissa become the low end of
    # fp16's, and the bits of value * 2^-14 are s000 mmm0 0000 0000, s and mmm the sign and the rest of the code.
    pairs = values.mul(2.0**-14).to(torch.float16).view(torch.int32)  # [T, K/2], the odd value on top
    # Multiplying by 2^13 + 1 and shifting by 22 brings both codes of a pair together, as _pair_codes reads them.
    index = pairs.mul_(_PAIR_MULTIPLIER).bitwise_right_shift_(_PAIR_SHIFT).bitwise_and_(_PAIR_MASK)
    return _pair_codes(values.device).index_select(0, index.view(-1)).view(index.shape)


@functools.cache
def _pair_codes(device: torch.device) -> Tensor:
    """Two packed codes, uint8 [1024], by their bits in the order S00s MMM mmm (capitals: the odd value)."""
    index = torch.arange(1024, device=device)
    even = (index & 7) | (index >> 3 & 8)
    odd = (index >> 3 & 7) | (index >> 6 & 8)
    return (even | odd << 4).to(torch.uint8)


@functools.cache
def _byte_values(device: torch.device) -> Tensor:
    """The two fp32 values of each byte, as float64 [256]: one 8-byte gather is faster than two of 4 bytes."""
    magnitudes = torch.tensor(_E2M1_MAGNITUDES, dtype=torch.float32, device=device)
    values = torch.cat([magnitudes, -magnitudes])  # by code
    byte = torch.arange(256, device=device)
    pairs = torch.stack([values[byte & 0xF], values[byte >> 4]], dim=1)  # [256, 2]
    return pairs.view(torch.float64).view(256)
