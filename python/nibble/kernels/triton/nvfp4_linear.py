"""An NVFP4 linear layer on GPUs without FP4 tensor cores (sm80 and later): W4A4 arithmetic, weights stay packed."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.triton.nvfp4_tiles import (
    CHUNK_COLUMNS,
    WEIGHT_UNIT,
    Tiling,
    fake_quantize,
    multiply_rows,
    num_multiprocessors,
    pack_tiles,
)

_QUANTIZE_CHUNKS = 8  # runs of 128 values that one program quantizes
_SUM_TILE = 1024
_MAX_SPLITS = 8
_MANY_OUTPUTS = 200_000  # for each multiprocessor: then the largest tiles, which are the fastest, keep all of them busy


class Nvfp4Linear:
    """`fake_quantize(x) @ weight.T * alpha`: `x [T, K]` fp32 or bf16, `alpha` fp32 [N], result [T, N] of `dtype`.

    The products e2m1 * e4m3 are exact, the sum is fp32, and `alpha` comes last. Where a few rows leave multiprocessors
    without work, the columns are shared out too, and their sums added in order: for one T always the same bits. No
    host synchronization, so a CUDA graph can capture a call; no rows launch nothing.
    """

    def __init__(
        self,
        values: Tensor,
        scales: Tensor,
        input_scale: Tensor,
        alpha: Tensor,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`values` uint8 [N, K/2] and `scales` e4m3 [N, K/16], not negative, as in the checkpoint; `input_scale` fp32
        scalar.
        """
        self.out_features, self.in_features = values.shape[0], values.shape[1] * 2
        self.weight = pack_tiles(values, scales)
        self.input_scale, self.dtype = input_scale, dtype
        self.alpha = alpha / WEIGHT_UNIT

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        out = x.new_empty(rows, self.out_features, dtype=self.dtype)
        if rows == 0:
            return out
        columns = self.weight.columns
        quantized = x.new_empty(rows, columns, dtype=torch.float16)
        _quantize_kernel[(triton.cdiv(rows * columns // CHUNK_COLUMNS, _QUANTIZE_CHUNKS),)](
            x,
            self.input_scale,
            quantized,
            x.stride(0),
            x.stride(1),
            rows,
            COLUMNS=self.in_features,
            PADDED_COLUMNS=columns,
            CHUNKS=_QUANTIZE_CHUNKS,
            num_warps=4,
            enable_fp_fusion=False,
        )
        tiling = self.choose_tiling(rows)
        row_tiles = triton.cdiv(self.out_features, tiling.block_n)
        tiles = row_tiles * triton.cdiv(rows, tiling.block_m)
        block_k = tiling.step(columns)
        programs = num_multiprocessors(x.device) * tiling.programs_per_multiprocessor
        splits = max(1, min(_MAX_SPLITS, columns // block_k, programs // tiles))
        sums = out if splits == 1 else x.new_empty(splits, rows, self.out_features, dtype=torch.float32)
        _linear_kernel[(tiles * splits,)](
            self.weight.words,
            self.weight.scales,
            self.alpha,
            quantized,
            sums,
            rows,
            ROWS=self.out_features,
            COLUMNS=columns,
            SPLITS=splits,
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            BLOCK_K=block_k,
            num_warps=tiling.num_warps,
            num_stages=tiling.stages(x.device),
        )
        if splits > 1:
            _sum_kernel[(rows, triton.cdiv(self.out_features, _SUM_TILE))](
                sums, self.alpha, out, rows, ROWS=self.out_features, SPLITS=splits, TILE=_SUM_TILE, num_warps=4
            )
        return out

    def choose_tiling(self, rows: int) -> Tiling:
        """The fastest of many on an H200 for the layers of DeepSeek-R1 and Qwen3-30B-A3B together, not for each."""
        if rows <= 16:
            return Tiling(16, 16, 64, 128, 4, 6, 4)
        if rows <= 32:
            return Tiling(32, 32, 64, 128, 4, 4, 4)
        if rows <= 64:
            return Tiling(64, 64, 64, 128, 4, 3, 3)
        if rows * self.out_features < _MANY_OUTPUTS * num_multiprocessors(self.alpha.device):
            return Tiling(128, 128, 64, 128, 4, 3, 2)
        return Tiling(128, 128, 128, 128, 8, 3)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr,
    input_scale_ptr,
    quantized_ptr,
    x_stride,
    x_column_stride,
    num_rows,
    COLUMNS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """e2m1 * e4m3 of x, fp16 in tile order, zeros for padding."""
    ROW_CHUNKS: tl.constexpr = PADDED_COLUMNS // 128
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    row = (chunk // ROW_CHUNKS).to(tl.int64)[:, None]
    first_column = (chunk % ROW_CHUNKS * 128)[:, None]
    place = tl.arange(0, 128)[None, :]
    column = first_column + place
    x = tl.load(
        x_ptr + row * x_stride + column * x_column_stride, mask=(row < num_rows) & (column < COLUMNS), other=0.0
    )
    x = fake_quantize(x.to(tl.float32).reshape(CHUNKS * 8, 16, 1), tl.load(input_scale_ptr), DIVIDE=True)
    x = x.reshape(CHUNKS, 4, 4, 2, 4).permute(0, 4, 2, 1, 3).reshape(CHUNKS, 128)  # t, b, p, j to j, b, t, p
    tl.store(quantized_ptr + row * PADDED_COLUMNS + first_column + place, x, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    words_ptr,
    scales_ptr,
    alpha_ptr,
    x_ptr,
    sums_ptr,
    num_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With one split [T, N], scaled; with several the sums of each, fp32 [splits, T, N]."""
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = COLUMNS // BLOCK_K
    SPLIT_STEPS: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    program = tl.program_id(0)
    row_tile = program % ROW_TILES
    split = program // ROW_TILES % SPLITS
    x_row = program // (ROW_TILES * SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = x_row < num_rows
    acc = multiply_rows(
        words_ptr, scales_ptr, row_tile * BLOCK_N, COLUMNS // 128,
        split * SPLIT_STEPS, tl.minimum(split * SPLIT_STEPS + SPLIT_STEPS, STEPS),
        x_ptr + x_row.to(tl.int64) * COLUMNS, mask, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if SPLITS == 1:
        acc *= tl.load(alpha_ptr + row, mask=row < ROWS, other=0.0)[:, None]
    sum_ptrs = sums_ptr + (split * num_rows + x_row).to(tl.int64)[:, None] * ROWS + row[None, :]
    tl.store(sum_ptrs, acc.T.to(sums_ptr.dtype.element_ty), mask=mask[:, None] & (row < ROWS)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _sum_kernel(sums_ptr, alpha_ptr, out_ptr, num_rows, ROWS: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    x_row = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = row < ROWS
    acc = tl.zeros([TILE], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(sums_ptr + (split * num_rows + x_row) * ROWS + row, mask=mask, other=0.0)
    acc *= tl.load(alpha_ptr + row, mask=mask, other=0.0)
    tl.store(out_ptr + x_row * ROWS + row, acc.to(out_ptr.dtype.element_ty), mask=mask)
