"""The wire row on a GPU: quantizing, packing and unpacking in one kernel each.

Twins of the functions of the same names in `nibble.kernels.torch.wire_row`, which defines the format.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.torch.nvfp4 import BLOCK_SIZE
from nibble.kernels.torch.wire_row import UnpackedRows, WireRowLayout
from nibble.kernels.triton.nvfp4 import (
    E4M3_NAN,
    ROUNDER_BITS,
    block_scale,
    corrected_reciprocal,
    e2m1_code,
    float_bits,
    magnitude,
    reciprocal_corrections,
)

# One block of 16 values a thread: then nothing crosses threads.
_NUM_WARPS = 4
_TILE_BLOCKS = 32 * _NUM_WARPS
# Where there is work for every multiprocessor, programs take several tiles: they load the next one while they
# quantize, and look only once for the reciprocals to use.
_MANY_BLOCKS = 2**20
_TILES_PER_PROGRAM = 8
# 4-byte words that one program copies: of ids and weights, of whole rows, and of a row's scales to be swizzled.
_ROUTING_TILE = 512
_UNPACK_TILE = 1024
_SWIZZLE_COLUMNS = 8

_PAIR_DTYPES = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


def quantize_pack(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, input_scale: Tensor) -> Tensor:
    """Quantizes `x` [T, H] (bf16 or fp32) and packs it with its routing, bit for bit like the torch twin.

    `topk_ids` int32 [T, K], `topk_weights` fp32 [T, K], `input_scale` fp32 scalar on the device, the same on every
    rank. Returns uint8 [T, row_bytes]. No host synchronization, so a CUDA graph can capture it; no rows launch
    nothing and give an empty buffer of that width. Raises ValueError when H is not a multiple of 16.
    """
    num_rows, hidden_size = x.shape
    layout = WireRowLayout(hidden_size=hidden_size, top_k=topk_ids.shape[1])
    assert x.dtype in _PAIR_DTYPES
    assert topk_ids.shape == topk_weights.shape == (num_rows, layout.top_k)
    rows = x.new_empty(num_rows, layout.row_bytes, dtype=torch.uint8)
    if num_rows == 0:
        return rows
    num_blocks = num_rows * hidden_size // BLOCK_SIZE
    tiles_per_program = _TILES_PER_PROGRAM if num_blocks >= _MANY_BLOCKS else 1
    routing_words = num_rows * (layout.row_bytes - layout.ids_offset) // 4
    routing_programs = triton.cdiv(routing_words, _ROUTING_TILE)
    block_programs = triton.cdiv(num_blocks, _TILE_BLOCKS * tiles_per_program)
    _quantize_pack_kernel[(routing_programs + block_programs,)](
        value_pairs(x),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        input_scale,
        rows,
        num_rows,
        routing_programs,
        BLOCKS_PER_ROW=hidden_size // BLOCK_SIZE,
        TOP_K=layout.top_k,
        SCALE_OFFSET=layout.scale_offset,
        IDS_OFFSET=layout.ids_offset,
        ROW_BYTES=layout.row_bytes,
        TILE_BLOCKS=_TILE_BLOCKS,
        TILES_PER_PROGRAM=tiles_per_program,
        ROUTING_TILE=_ROUTING_TILE,
        num_warps=_NUM_WARPS,
        enable_fp_fusion=False,
    )
    return rows


def unpack(rows: Tensor, layout: WireRowLayout, swizzled: bool = False) -> UnpackedRows:
    """The fields of `rows` (uint8 [T, row_bytes], contiguous), each copied into a contiguous tensor of its own.

    With `swizzled` the scales come as `nibble.kernels.torch.nvfp4.swizzle_scales` returns them: in 128x4 tiles,
    float8_e4m3fn [ceil(T/128) * 128, ceil(H/64) * 4], padded with zeros. No host synchronization; no rows launch
    nothing and give empty fields. Raises ValueError when the rows have another width than `layout`.
    """
    if rows.shape[1] != layout.row_bytes:
        raise ValueError(
            f"rows of {rows.shape[1]} bytes do not fit the layout of {layout.row_bytes} bytes "
            f"(hidden_size {layout.hidden_size}, top_k {layout.top_k})"
        )
    num_rows, blocks_per_row = rows.shape[0], layout.hidden_size // BLOCK_SIZE
    row_tiles, scale_words = triton.cdiv(num_rows, 128), triton.cdiv(blocks_per_row, 4)
    scale_shape = (row_tiles * 128, scale_words * 4) if swizzled else (num_rows, blocks_per_row)
    fields = UnpackedRows(
        x_fp4=rows.new_empty(num_rows, layout.scale_offset),
        x_scale=rows.new_empty(scale_shape, dtype=torch.float8_e4m3fn),
        topk_ids=rows.new_empty(num_rows, layout.top_k, dtype=torch.int32),
        topk_weights=rows.new_empty(num_rows, layout.top_k, dtype=torch.float32),
    )
    if num_rows == 0:
        return fields
    copy_programs = triton.cdiv(num_rows * layout.row_bytes // 4, _UNPACK_TILE)
    swizzle_programs = row_tiles * triton.cdiv(scale_words, _SWIZZLE_COLUMNS) if swizzled else 0
    _unpack_kernel[(copy_programs + swizzle_programs,)](
        rows.view(torch.int32),
        fields.x_fp4.view(torch.int32),
        fields.x_scale.view(torch.uint8),
        fields.topk_ids,
        fields.topk_weights.view(torch.int32),
        num_rows,
        copy_programs,
        BLOCKS_PER_ROW=blocks_per_row,
        TOP_K=layout.top_k,
        SCALE_OFFSET=layout.scale_offset,
        IDS_OFFSET=layout.ids_offset,
        ROW_BYTES=layout.row_bytes,
        SWIZZLED=swizzled,
        SWIZZLE_COLUMNS=_SWIZZLE_COLUMNS,
        TILE=_UNPACK_TILE,
        num_warps=_NUM_WARPS,
    )
    return fields


def value_pairs(x: Tensor) -> Tensor:
    """`x`, contiguous, as integers of two values each. Copies only if it has to."""
    x = x.contiguous()
    return (x.clone() if x.storage_offset() % 2 else x).view(_PAIR_DTYPES[x.dtype])


@triton.jit(do_not_specialize=["num_rows", "routing_programs"])
def _quantize_pack_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
    input_scale_ptr,
    rows_ptr,
    num_rows,
    routing_programs,
    BLOCKS_PER_ROW: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    IDS_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    ROUTING_TILE: tl.constexpr,
):
    program = tl.program_id(0)
    if program < routing_programs:
        WORDS: tl.constexpr = (ROW_BYTES - IDS_OFFSET) // 4
        index = program * ROUTING_TILE + tl.arange(0, ROUTING_TILE)
        row = index // WORDS
        copy_routing(
            row, index - row * WORDS, row < num_rows, ids_ptr, weights_ptr, rows_ptr,
            TOP_K, SCALE_OFFSET + BLOCKS_PER_ROW, IDS_OFFSET, ROW_BYTES,
        )  # fmt: skip
    else:
        num_blocks = num_rows * BLOCKS_PER_ROW
        first_tile = (program - routing_programs) * TILES_PER_PROGRAM
        end = first_tile + TILES_PER_PROGRAM
        block = first_tile * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
        low, high = load_blocks(block, block < num_blocks, x_ptr)
        input_scale, corrections, multiply = load_input_scale(input_scale_ptr, x_ptr)
        for tile in range(first_tile, end):
            next_block = block + TILE_BLOCKS
            next_low, next_high = load_blocks(next_block, (next_block < num_blocks) & (tile + 1 < end), x_ptr)
            quantize_blocks(
                block, block < num_blocks, low, high, input_scale, corrections, multiply, rows_ptr,
                BLOCKS_PER_ROW, SCALE_OFFSET, ROW_BYTES,
            )  # fmt: skip
            block, low, high = next_block, next_low, next_high


@triton.jit
def load_blocks(block, mask, x_ptr):
    """The pairs of blocks, counted through all rows, as two halves [blocks, 4]: so a thread takes 16 bytes at once."""
    pair_ptr = x_ptr + block.to(tl.int64)[:, None] * 8 + tl.arange(0, 4)[None, :]
    mask = mask[:, None]
    return tl.load(pair_ptr, mask=mask, other=0), tl.load(pair_ptr + 4, mask=mask, other=0)


@triton.jit
def load_input_scale(input_scale_ptr, x_ptr):
    """The scale of all rows, and the reciprocals to use with it, where those of its divisors give the right codes."""
    input_scale = tl.load(input_scale_ptr)
    is_bf16: tl.constexpr = x_ptr.dtype.element_ty == tl.int32
    corrections, multiply = 0, False
    if is_bf16:
        corrections, multiply = reciprocal_corrections(input_scale)
    return input_scale, corrections, multiply


@triton.jit
def quantize_blocks(
    block,
    mask,
    low,
    high,
    input_scale,
    corrections,
    multiply,
    rows_ptr,
    BLOCKS_PER_ROW: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Quantizes blocks, counted through all rows, and stores values and scales in their wire rows."""
    p0, p1, p2, p3 = _split4(low)
    p4, p5, p6, p7 = _split4(high)
    low_amax = tl.maximum(tl.maximum(_pair_amax(p0), _pair_amax(p1)), tl.maximum(_pair_amax(p2), _pair_amax(p3)))
    high_amax = tl.maximum(tl.maximum(_pair_amax(p4), _pair_amax(p5)), tl.maximum(_pair_amax(p6), _pair_amax(p7)))
    amax = tl.maximum(low_amax, high_amax).to(tl.float32, bitcast=True)
    scale_byte, scale = block_scale(amax, input_scale)
    divisor = scale * input_scale
    if multiply:
        factor = tl.where(divisor > 0.0, corrected_reciprocal(scale, divisor, corrections), 0.0)
        low_word = _encode4(p0, p1, p2, p3, factor, False)
        high_word = _encode4(p4, p5, p6, p7, factor, False)
    else:
        factor = tl.where(divisor > 0.0, divisor, float("inf"))
        low_word = _encode4(p0, p1, p2, p3, factor, True)
        high_word = _encode4(p4, p5, p6, p7, factor, True)
    is_nan = scale_byte == E4M3_NAN
    words = tl.join(tl.where(is_nan, 0, low_word), tl.where(is_nan, 0, high_word))

    row = block // BLOCKS_PER_ROW
    column = block - row * BLOCKS_PER_ROW
    row_ptr = rows_ptr + row.to(tl.int64) * ROW_BYTES
    word_ptr = _as_words(row_ptr + column * 8)
    tl.store(word_ptr[:, None] + tl.arange(0, 2)[None, :], words, mask=mask[:, None])
    tl.store(row_ptr + SCALE_OFFSET + column, scale_byte.to(tl.uint8), mask=mask)


@triton.jit
def _split4(pairs):
    """The four columns of [N, 4]."""
    even, odd = tl.split(pairs.reshape(pairs.shape[0], 2, 2))
    p0, p2 = tl.split(even)
    p1, p3 = tl.split(odd)
    return p0, p1, p2, p3


@triton.jit
def _pair_bits(pair):
    """The bits of the even and the odd value of a pair, as fp32, int32."""
    if pair.dtype == tl.int32:
        even = pair << 16
        odd = pair & -0x10000
    else:
        even = pair.to(tl.int32)
        odd = (pair >> 32).to(tl.int32)
    return even, odd


@triton.jit
def _pair_amax(pair):
    """The bits of the larger magnitude. As integers they are ordered like the numbers, with NaN above infinity."""
    even, odd = _pair_bits(pair)
    return tl.maximum(float_bits(magnitude(even)), float_bits(magnitude(odd)))


@triton.jit
def _encode4(p0, p1, p2, p3, factor, DIVIDE: tl.constexpr):
    """The eight codes of four pairs, int32, the first in the lowest bits."""
    word = _pair_codes(p3, factor, DIVIDE)
    word = word * 256 + _pair_codes(p2, factor, DIVIDE)
    word = word * 256 + _pair_codes(p1, factor, DIVIDE)
    word = word * 256 + _pair_codes(p0, factor, DIVIDE)
    # Each code brought 2 * ROUNDER_BITS, of which the last two are still there, and has its sign in the lowest bit.
    word -= 2 * 17 * ROUNDER_BITS & 0xFFFFFFFF
    return (((word >> 1) & 0x77777777) | ((word << 3) & 0x88888888)).to(tl.int32, bitcast=True)


@triton.jit
def _pair_codes(pair, factor, DIVIDE: tl.constexpr):
    even, odd = _pair_bits(pair)
    return _code(odd, factor, DIVIDE) * 16 + _code(even, factor, DIVIDE)


@triton.jit
def _code(bits, factor, DIVIDE: tl.constexpr):
    """The code of a value by its bits, divided or multiplied by `factor`, uint32: shifted left, with the sign below."""
    if DIVIDE:
        y = tl.div_rn(magnitude(bits), factor)
        bits = tl.where(y == y, bits, 0)  # infinity by infinity counts as zero
        y = tl.where(y == y, y, 0.0)
    else:
        y = magnitude(bits) * factor
    return (e2m1_code(y).to(tl.uint32, bitcast=True) << 1) | (bits.to(tl.uint32, bitcast=True) >> 31)


@triton.jit
def copy_routing(
    row,
    column,
    mask,
    ids_ptr,
    weights_ptr,
    rows_ptr,
    TOP_K: tl.constexpr,
    SCALE_END: tl.constexpr,
    IDS_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
):
    """Writes the words `column` of what follows the scales of `row`: padding, ids, weights, padding."""
    is_id = column < TOP_K
    is_weight = (column >= TOP_K) & (column < 2 * TOP_K)
    ids = tl.load(ids_ptr + row * TOP_K + column, mask=mask & is_id, other=0)
    weights = tl.load(weights_ptr + row * TOP_K + column - TOP_K, mask=mask & is_weight, other=0.0)
    words = tl.where(is_weight, float_bits(weights), ids)
    row_ptr = rows_ptr + row.to(tl.int64) * ROW_BYTES
    tl.store(_as_words(row_ptr + IDS_OFFSET) + column, words, mask=mask)
    for byte in tl.static_range(SCALE_END, IDS_OFFSET):
        tl.store(row_ptr + byte, 0, mask=mask & (column == 0))


@triton.jit(do_not_specialize=["num_rows", "copy_programs"])
def _unpack_kernel(
    rows_ptr,
    x_fp4_ptr,
    x_scale_ptr,
    ids_ptr,
    weights_ptr,
    num_rows,
    copy_programs,
    BLOCKS_PER_ROW: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    IDS_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SWIZZLED: tl.constexpr,
    SWIZZLE_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copies rows in words of 4 bytes, `TILE` a program; further programs copy the scales if these get swizzled."""
    ROW_WORDS: tl.constexpr = ROW_BYTES // 4
    SCALES: tl.constexpr = SCALE_OFFSET // 4
    IDS: tl.constexpr = IDS_OFFSET // 4
    program = tl.program_id(0)
    if program < copy_programs:
        index = program * TILE + tl.arange(0, TILE)
        row = index // ROW_WORDS
        column = index - row * ROW_WORDS
        mask = row < num_rows
        words = tl.load(rows_ptr + index, mask=mask, other=0)
        _store_field(x_fp4_ptr, words, row, column, mask, SCALES)
        _store_field(ids_ptr, words, row, column - IDS, mask, TOP_K)
        _store_field(weights_ptr, words, row, column - (IDS + TOP_K), mask, TOP_K)
        if not SWIZZLED:
            column -= SCALES
            if BLOCKS_PER_ROW % 4 == 0:
                _store_field(_as_words(x_scale_ptr), words, row, column, mask, BLOCKS_PER_ROW // 4)
            else:
                for byte in tl.static_range(4):
                    scales = (words >> (8 * byte)).to(tl.uint8)
                    _store_field(x_scale_ptr, scales, row, column * 4 + byte, mask, BLOCKS_PER_ROW)
    else:
        _swizzle_tile(
            program - copy_programs, rows_ptr + SCALES, _as_words(x_scale_ptr), num_rows,
            BLOCKS_PER_ROW, ROW_WORDS, SWIZZLE_COLUMNS,
        )  # fmt: skip


@triton.jit
def _store_field(field_ptr, elements, row, column, mask, COLUMNS: tl.constexpr):
    """Stores those `elements` whose column is one of the field's."""
    tl.store(field_ptr + row * COLUMNS + column, elements, mask=mask & (column >= 0) & (column < COLUMNS))


@triton.jit
def _swizzle_tile(
    tile,
    linear_ptr,
    swizzled_ptr,
    num_rows,
    BLOCKS_PER_ROW: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copies the scales of 128 rows, `COLUMNS` words of 4 wide, to where `swizzle_scales` puts them, or zeros."""
    SCALE_WORDS: tl.constexpr = (BLOCKS_PER_ROW + 3) // 4
    TILES_PER_ROW: tl.constexpr = (SCALE_WORDS + COLUMNS - 1) // COLUMNS
    row_tile = tile // TILES_PER_ROW
    # A row of the tile is row_32 + 32 * quarter; swizzled, the quarters of one row_32 and column are neighbours.
    row_32 = tl.arange(0, 32)[:, None, None]
    quarter = tl.arange(0, 4)[None, :, None]
    column = tile % TILES_PER_ROW * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    row = row_tile * 128 + quarter * 32 + row_32
    words = tl.load(linear_ptr + row * ROW_WORDS + column, mask=(row < num_rows) & (column < SCALE_WORDS), other=0)
    if BLOCKS_PER_ROW % 4 != 0:  # then the last word of a row holds scales and padding
        LAST: tl.constexpr = (1 << (BLOCKS_PER_ROW % 4 * 8)) - 1
        words = tl.where(column == SCALE_WORDS - 1, words & LAST, words)
    offset = (row_tile * SCALE_WORDS + column) * 128 + row_32 * 4 + quarter
    tl.store(swizzled_ptr + offset, words, mask=column < SCALE_WORDS)


@triton.jit
def _as_words(ptr):
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)
