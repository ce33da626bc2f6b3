"""Matrix products with NVFP4 weights in Triton, for GPUs without FP4 tensor cores: weights stay packed in memory.

A product of an e2m1 value and an e4m3 scale has at most six significant bits, from 2^-10 to 2688: it is exact in fp16.
So both operands are unpacked to fp16, multiplied by fp16 tensor cores and accumulated in fp32.

Weights are rearranged once, at load, so that unpacking takes few instructions and moves nothing between threads:

- `NvFp4Tiles` stores chunks of 16 rows x 128 columns, each contiguous, padded with zeros.
- Four neighbouring codes share an int16 with their bits at ``s0 s2 s3 s1 mmm0 mmm1 mmm2 mmm3`` (s the sign, mmm the
  rest). A left shift by 3 j brings the magnitude of code j to where fp16 has the lowest two bits of the exponent and
  the highest of the mantissa, which makes it the value times 2^-14; its sign needs a shift of 0, 3, 1 or 2.
- A block scale s is stored as the exponent and three bits of mantissa of the fp16 number 2^7 s, which no e4m3 scale
  needs more than (zero and NaN included). Unpacked weights are therefore 2^-7 of their value, `WEIGHT_UNIT`.
- In the matrix product the columns of a chunk come in "tile order": column ``32 t + 8 b + 4 p + j`` (t, b, j < 4,
  p < 2) at place ``32 j + 8 b + 2 t + p``. Then a thread's 16 bytes of a chunk's row are its operands of tensor core
  instructions. The other operand has to have its columns in that order too.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.triton.nvfp4 import E2M1_MAX, E4M3_NAN, block_scale, float_bits, magnitude, round_scale

CHUNK_ROWS = 16
CHUNK_COLUMNS = 128
ROW_MULTIPLE = 128
WEIGHT_UNIT = 2.0**-7

_CHUNK_COLUMNS = tl.constexpr(CHUNK_COLUMNS)
_CHUNK_WORDS = tl.constexpr(CHUNK_ROWS * CHUNK_COLUMNS // 4)
_CHUNK_SCALES = tl.constexpr(CHUNK_ROWS * CHUNK_COLUMNS // 16)
_ROUNDER = tl.constexpr(1.5 * 2.0**22)
_EXPONENT = tl.constexpr(0x7F800000)
_FP32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True, eq=False)
class NvFp4Tiles:
    """Weights [..., N, K] in chunks, N and K padded to multiples of `ROW_MULTIPLE` and `CHUNK_COLUMNS`."""

    words: Tensor  # int16 [..., N/16, K/128, 16, 32]
    scales: Tensor  # uint8 [..., N/16, K/128, 16, 8]

    @property
    def columns(self) -> int:
        """K, padded."""
        return self.words.shape[-3] * CHUNK_COLUMNS

    @property
    def rows(self) -> int:
        """N, padded."""
        return self.words.shape[-4] * CHUNK_ROWS


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: tiles of `block_n` rows of weights by `block_m` rows of x, steps of `block_k` columns."""

    block_m: int
    small_m: int  # what a block takes instead of `block_m` if that is enough for its rows
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_multiprocessor: int = 1  # to have so many, columns are shared out, too
    max_registers: int | None = None  # of a thread: with 4 warps and 128 of them four programs fit

    def step(self, columns: int) -> int:
        """The columns of a step, for a padded width of `columns`."""
        return self.block_k if columns % self.block_k == 0 else CHUNK_COLUMNS

    def stages(self, device: torch.device) -> int:
        """As many of `num_stages` as fit into the shared memory of a multiprocessor."""
        stage_bytes = self.block_k * (2 * self.block_m + self.block_n * 9 // 16)
        return min(self.num_stages, _shared_memory(device) // stage_bytes)


def pack_tiles(values: Tensor, scales: Tensor) -> NvFp4Tiles:
    """Rearranges `values` uint8 [N, K/2] and `scales` e4m3 [N, K/16] (not negative), as in a checkpoint."""
    v = values.contiguous().view(torch.int16)
    magnitudes = (v & 7) << 9 | (v & 0x70) << 2 | v >> 5 & 0x38 | v >> 12 & 7
    signs = (v & 8) << 12 | (v & 0x80) << 5 | (v & 0x800) << 3 | v >> 2 & 0x2000
    scale_bytes = ((scales.half() / WEIGHT_UNIT).view(torch.int16) >> 7).to(torch.uint8)
    return NvFp4Tiles(words=_to_chunks(magnitudes | signs, 4), scales=_to_chunks(scale_bytes, 16))


def padded_columns(columns: int) -> int:
    return -(-columns // CHUNK_COLUMNS) * CHUNK_COLUMNS


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU, or 1 where kernels are interpreted."""
    return 1 if device.type == "cpu" else _device_property(device, "multiprocessor_count")


def _shared_memory(device: torch.device) -> int:
    """The bytes that a program may use; where kernels are interpreted, enough."""
    return 2**20 if device.type == "cpu" else _device_property(device, "max_shared_mem")


@functools.cache
def _device_property(device: torch.device, name: str) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device.index)[name]


def _to_chunks(elements: Tensor, codes: int) -> Tensor:
    """[N, K/codes] to [N/16, K/128, 16, 128/codes], padded."""
    rows, columns = elements.shape
    padded_rows = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
    padded = elements.new_zeros(padded_rows, padded_columns(columns * codes) // codes)
    padded[:rows, :columns] = elements
    return padded.view(padded_rows // CHUNK_ROWS, CHUNK_ROWS, -1, CHUNK_COLUMNS // codes).transpose(1, 2).contiguous()


@triton.jit
def weight_row_ptrs(ptr, first_row, num_chunks, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """Pointers [BLOCK_N, 1] to rows of the first chunks; `CHUNK` is the size of a chunk in elements."""
    row = first_row + tl.arange(0, BLOCK_N)
    return (ptr + row // 16 * (num_chunks * CHUNK) + row % 16 * (CHUNK // 16))[:, None]


@triton.jit
def multiply_rows(
    words_ptr,
    scales_ptr,
    first_row,
    num_chunks,
    first_step,
    end_step,
    x_row_ptrs,
    x_mask,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`BLOCK_N` rows of weights by `BLOCK_M` rows of x: fp32 [BLOCK_N, BLOCK_M], in `WEIGHT_UNIT`.

    `words_ptr` and `scales_ptr` point to a matrix of `NvFp4Tiles`, `num_chunks` chunks wide; `x_row_ptrs` [BLOCK_M]
    to rows of fp16 in tile order, read where `x_mask` is true. Columns are those of the steps of `BLOCK_K`.
    """
    CHUNKS: tl.constexpr = BLOCK_K // _CHUNK_COLUMNS
    word = tl.arange(0, 32 * CHUNKS)[None, :]
    scale = tl.arange(0, 8 * CHUNKS)[None, :]
    word_ptrs = weight_row_ptrs(words_ptr, first_row, num_chunks, BLOCK_N, _CHUNK_WORDS)
    word_ptrs += word // 32 * _CHUNK_WORDS + word % 32 + first_step * (CHUNKS * _CHUNK_WORDS)
    scale_ptrs = weight_row_ptrs(scales_ptr, first_row, num_chunks, BLOCK_N, _CHUNK_SCALES)
    scale_ptrs += scale // 8 * _CHUNK_SCALES + scale % 8 + first_step * (CHUNKS * _CHUNK_SCALES)
    x_ptrs = x_row_ptrs[:, None] + tl.arange(0, BLOCK_K)[None, :] + first_step * BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(first_step, end_step):
        words = tl.load(word_ptrs)
        scales = tl.load(scale_ptrs)
        x = tl.load(x_ptrs, mask=x_mask[:, None], other=0.0)
        acc = tl.dot(_unpack(words, scales, BLOCK_N, CHUNKS), x.T, acc)
        word_ptrs += CHUNKS * _CHUNK_WORDS
        scale_ptrs += CHUNKS * _CHUNK_SCALES
        x_ptrs += BLOCK_K
    return acc


@triton.jit
def _unpack(words, scales, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr):
    """int16 [BLOCK_N, 32 CHUNKS] and uint8 [BLOCK_N, 8 CHUNKS] to fp16 [BLOCK_N, 128 CHUNKS], in tile order."""
    scales = (scales.to(tl.int16) << 7)[:, :, None]
    scales = tl.broadcast_to(scales, [BLOCK_N, 8 * CHUNKS, 4]).reshape(BLOCK_N, 32 * CHUNKS)
    w0, w1, w2, w3 = _decode(words, scales.to(tl.float16, bitcast=True))
    w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_N, CHUNKS, 4, 4, 2, 4)  # chunk, t, b, p, j
    return w.permute(0, 1, 5, 3, 2, 4).reshape(BLOCK_N, CHUNKS * 128)


@triton.jit
def _decode(words, scales):
    """The four weights of each int16, by its scale: fp16, four tensors of the shape of `words`."""
    if _INTERPRETED:
        bits = words.to(tl.int32)
        w0 = bits & 0x8E00
        w1 = (bits << 3) & 0x8E00
        w2 = ((bits << 6) & 0x0E00) | ((bits << 1) & 0x8000)
        w3 = ((bits << 9) & 0x0E00) | ((bits << 2) & 0x8000)
        return _as_fp16(w0) * scales, _as_fp16(w1) * scales, _as_fp16(w2) * scales, _as_fp16(w3) * scales
    else:
        # The same on two at a time. A factor 2^a + 2^b shifts magnitude and sign at once; carries end below them.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 w0, w1, w2, w3;
            and.b32 w0, $4, 0x8E008E00;
            shl.b32 w1, $4, 3;
            and.b32 w1, w1, 0x8E008E00;
            and.b32 w2, $4, 0x40384038;
            mul.lo.u32 w2, w2, 66;
            and.b32 w2, w2, 0x8E008E00;
            and.b32 w3, $4, 0x20072007;
            mul.lo.u32 w3, w3, 516;
            and.b32 w3, w3, 0x8E008E00;
            mul.rn.f16x2 $0, w0, $5;
            mul.rn.f16x2 $1, w1, $5;
            mul.rn.f16x2 $2, w2, $5;
            mul.rn.f16x2 $3, w3, $5;
            }""",
            "=r,=r,=r,=r,r,r",
            [words, scales],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def _as_fp16(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def e2m1_value(code):
    """The value of a code (int32 from 0 to 15) times 2^-14, fp32."""
    return _as_fp16(((code & 7) << 9) | ((code & 8) << 12)).to(tl.float32)


@triton.jit
def e4m3_value(byte):
    """The value of a byte of e4m3 (int32), fp32."""
    value = _as_fp16(((byte & 0x7F) << 7) | ((byte & 0x80) << 8)).to(tl.float32) * 2.0**8
    return tl.where((byte & 0x7F) == E4M3_NAN, float("nan"), value)


@triton.jit
def fake_quantize(blocks, input_scale, DIVIDE: tl.constexpr):
    """e2m1 * e4m3 of fp32 `blocks` [B, 16, M], quantized along axis 1 by the contract of NVFP4; fp16, exact.

    Without `DIVIDE` it multiplies by approximate reciprocals, which is several times faster. Then a block scale or a
    value within a few units in the last place of a tie may be rounded to its other side.
    """
    bits = float_bits(blocks)
    # As integers, magnitudes are ordered like the numbers, with NaN above infinity.
    amax = tl.max(bits & 0x7FFFFFFF, axis=1).to(tl.float32, bitcast=True)
    if DIVIDE:
        scale_byte, scale = block_scale(amax, input_scale)
    else:
        scale_byte, scale = round_scale(amax * (1.0 / (input_scale * E2M1_MAX)))
    divisor = scale * input_scale
    divisor = tl.where(divisor > 0.0, divisor, float("inf"))
    if DIVIDE:
        y = tl.div_rn(magnitude(bits), divisor[:, None, :])
    else:
        y = magnitude(bits) * tl.minimum(1.0 / divisor, _FP32_MAX)[:, None, :]
    y = tl.minimum(y, E2M1_MAX)
    # e2m1 is spaced by 2^(e-1) around a number of exponent e, at least 0, and so is fp32 around 1.5 * 2^22 * 2^e.
    rounder = tl.maximum((float_bits(y) & _EXPONENT).to(tl.float32, bitcast=True), 1.0) * _ROUNDER
    value = ((y + rounder) - rounder) * tl.where(scale_byte == E4M3_NAN, float("nan"), scale)[:, None, :]
    return tl.where(bits < 0, -value, value).to(tl.float16)
