"""FP8 rows on a GPU: quantizing and summing in one kernel each, and the device functions that other kernels share.

Twins of the functions of the same names in `nibble.kernels.torch.fp8_row`, which defines the format.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from nibble.kernels.torch.fp8_row import ABOVE_448, EXPONENT_448, GROUP_SIZE, INFINITY, Fp8RowLayout
from nibble.kernels.triton.nvfp4 import float_bits, magnitude, round_scale
from nibble.kernels.triton.nvfp4_tiles import e4m3_value

TILE = 1024  # columns of a row that a program takes
_NUM_WARPS = 4

_GROUP_SIZE = tl.constexpr(GROUP_SIZE)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(INFINITY)
_ABOVE_448 = tl.constexpr(ABOVE_448)
_EXPONENT_448 = tl.constexpr(EXPONENT_448)


def quantize_fp8_rows(x: Tensor, out: Tensor | None = None) -> Tensor:
    """FP8 rows of `x` [T, H] (fp32 or bf16), bit for bit like the torch twin: uint8 [T, row_bytes], `out` if given.

    Rows of `x` may lie apart; those of `out` are contiguous. No host synchronization, so a CUDA graph can capture it;
    no rows launch nothing.
    """
    num_rows, hidden_size = x.shape
    layout = Fp8RowLayout(hidden_size)
    if out is None:
        out = x.new_empty(num_rows, layout.row_bytes, dtype=torch.uint8)
    assert x.stride(1) == 1 and out.is_contiguous() and out.shape == (num_rows, layout.row_bytes)
    if num_rows:
        _quantize_fp8_kernel[(num_rows, triton.cdiv(hidden_size, TILE))](
            x,
            out,
            x.stride(0),
            HIDDEN_SIZE=hidden_size,
            SCALE_OFFSET=layout.scale_offset,
            ROW_BYTES=layout.row_bytes,
            TILE=TILE,
            num_warps=_NUM_WARPS,
        )
    return out


def sum_fp8_rows(terms: Tensor, num_terms: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """The sums of T rows over `num_terms` ranks, bit for bit like the torch twin: `dtype` [T, H], fp32 or bf16.

    `terms` is contiguous, uint8 [num_terms * T, row_bytes]. No host synchronization, so a CUDA graph can capture it; no
    rows launch nothing.
    """
    layout = Fp8RowLayout(hidden_size)
    num_rows = terms.shape[0] // num_terms
    assert terms.is_contiguous() and terms.shape == (num_terms * num_rows, layout.row_bytes)
    out = terms.new_empty(num_rows, hidden_size, dtype=dtype)
    if num_rows:
        _sum_fp8_kernel[(num_rows, triton.cdiv(hidden_size, TILE))](
            terms,
            out,
            num_rows,
            NUM_TERMS=num_terms,
            HIDDEN_SIZE=hidden_size,
            SCALE_OFFSET=layout.scale_offset,
            ROW_BYTES=layout.row_bytes,
            TILE=TILE,
            num_warps=_NUM_WARPS,
        )
    return out


def leave_result(result: Tensor, out: Tensor) -> Tensor:
    """Leaves experts' `result` [S, H] in `out`, which it returns: bf16 [S, H], or FP8 rows, uint8 [S, row_bytes]."""
    return quantize_fp8_rows(result, out) if out.dtype == torch.uint8 else out.copy_(result)


@triton.jit
def _quantize_fp8_kernel(
    x_ptr,
    rows_ptr,
    x_stride,
    HIDDEN_SIZE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    x = tl.load(x_ptr + row * x_stride + column, mask=column < HIDDEN_SIZE, other=0.0).to(tl.float32)
    store_tile(x, tl.program_id(1), rows_ptr + row * ROW_BYTES, HIDDEN_SIZE, SCALE_OFFSET, TILE)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_fp8_kernel(
    terms_ptr,
    out_ptr,
    num_rows,
    NUM_TERMS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values, scales = (), ()
    for term in tl.static_range(NUM_TERMS):  # all on their way before the first is added
        row_ptr = terms_ptr + (term * num_rows + row) * ROW_BYTES
        value, scale = load_tile(tl.program_id(1), row_ptr, HIDDEN_SIZE, SCALE_OFFSET, TILE)
        values, scales = values + (value,), scales + (scale,)  # type: ignore[assignment]  # noqa: RUF005
    acc = add_tiles(values, scales, NUM_TERMS)
    store_sum(acc, tl.program_id(1), out_ptr + row * HIDDEN_SIZE, HIDDEN_SIZE, TILE)


@triton.jit
def store_tile(x, tile, row_ptr, HIDDEN_SIZE: tl.constexpr, SCALE_OFFSET: tl.constexpr, TILE: tl.constexpr):
    """Quantizes `x` [TILE], fp32 and zero beyond the row's end, into columns `tile * TILE`, … of an FP8 row."""
    groups = x.reshape(TILE // _GROUP_SIZE, _GROUP_SIZE)
    # As integers, magnitudes are ordered like the numbers, with NaN above infinity.
    largest = tl.max(float_bits(groups) & _MAGNITUDE, axis=1)
    exponent = tl.maximum(((largest + _ABOVE_448) >> 23) - _EXPONENT_448, 1)
    scale = tl.where(largest < _INFINITY, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    reciprocal = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    group, column = _places(tile, TILE)
    tl.store(row_ptr + column, _e4m3_byte(groups * reciprocal[:, None]), mask=column < HIDDEN_SIZE)
    tl.store(_scales(row_ptr, SCALE_OFFSET) + group, scale, mask=group * _GROUP_SIZE < HIDDEN_SIZE)


@triton.jit
def load_tile(tile, row_ptr, HIDDEN_SIZE: tl.constexpr, SCALE_OFFSET: tl.constexpr, TILE: tl.constexpr):
    """Columns `tile * TILE`, … of an FP8 row: bytes by group [TILE / 128, 128], and scales [TILE / 128]."""
    group, column = _places(tile, TILE)
    values = tl.load(row_ptr + column, mask=column < HIDDEN_SIZE, other=0, eviction_policy="evict_first")
    scales = tl.load(_scales(row_ptr, SCALE_OFFSET) + group, mask=group * _GROUP_SIZE < HIDDEN_SIZE, other=0.0)
    return values, scales


@triton.jit
def add_tiles(values, scales, NUM_TERMS: tl.constexpr):
    """The sum, in order, of what `load_tile` returned for each term, in fp32."""
    acc = _e4m3_value(values[0]) * scales[0][:, None]
    for term in tl.static_range(1, NUM_TERMS):
        acc += _e4m3_value(values[term]) * scales[term][:, None]
    return acc


@triton.jit
def store_sum(acc, tile, row_ptr, HIDDEN_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Columns `tile * TILE`, … of a row of fp32 or bf16."""
    _, column = _places(tile, TILE)
    tl.store(row_ptr + column, acc.to(row_ptr.dtype.element_ty), mask=column < HIDDEN_SIZE)


@triton.jit
def _places(tile, TILE: tl.constexpr):
    """The groups of a tile, and their columns [TILE / 128, 128]."""
    group = tile * (TILE // _GROUP_SIZE) + tl.arange(0, TILE // _GROUP_SIZE)
    return group, group[:, None] * _GROUP_SIZE + tl.arange(0, _GROUP_SIZE)[None, :]


@triton.jit
def _scales(row_ptr, SCALE_OFFSET: tl.constexpr):
    return (row_ptr + SCALE_OFFSET).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def _e4m3_byte(x):
    """fp32 of at most 448, or something else where nobody reads it, rounded to e4m3."""
    if cuda_capability_geq(8, 9):
        byte = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code, _ = round_scale(magnitude(float_bits(x)))
        byte = (code | ((float_bits(x) >> 24) & 0x80)).to(tl.uint8)
    return byte


@triton.jit
def _e4m3_value(byte):
    if cuda_capability_geq(8, 9):
        value = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        value = e4m3_value(byte.to(tl.int32))
    return value
