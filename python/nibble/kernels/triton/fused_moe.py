"""The routed NVFP4 experts of one rank on GPUs without FP4 tensor cores (sm80 and later).

The W4A4 arithmetic of `nibble.kernels.torch.fused_moe.fused_moe_nvfp4`, in a chain of kernels:

1. `prepare` sorts the (row, expert) pairs of this rank by expert, into blocks of pairs of one expert, and unpacks the
   rows to fp16;
2. `_gate_up_kernel` multiplies by gate and up, applies SwiGLU and quantizes the result. Where it has few tiles for the
   multiprocessors, it shares out the columns, too, and `_sum_splits_kernel` does the rest;
3. `_down_kernel` multiplies by down and by the routing weight, one result a pair;
4. `add_results` adds the results of each row, and quantizes the sum where it belongs into an FP8 row.

Which blocks there are is known on the device only, so there are programs for as many as there may be. The host waits
for nothing, and sizes depend on shapes alone: a CUDA graph can capture a call. The chain is one of
`nibble.kernels.triton.dependent_launch`. Nothing is added in an order that may vary, so the same inputs give the same
bits; the order of the rows, and of a row's experts, does not matter. With another number of rows, or of experts of the
whole layer, the sums over columns may be cut otherwise.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.triton.dependent_launch import let_successor_start, overlaps_predecessor, wait_for_predecessor
from nibble.kernels.triton.moe_prepare import prepare
from nibble.kernels.triton.moe_results import add_results
from nibble.kernels.triton.moe_routing import load_block, load_pairs
from nibble.kernels.triton.nvfp4_tiles import (
    ROW_MULTIPLE,
    WEIGHT_UNIT,
    NvFp4Tiles,
    Tiling,
    fake_quantize,
    multiply_rows,
    num_multiprocessors,
    pack_tiles,
    padded_columns,
)

# Rows of one pass: beyond, the results of all pairs would take more memory than they save time.
_MAX_ROWS = 4096
_SPLIT_COLUMNS = 1024  # what a split of gate and up has at least
_MAX_SPLITS = 4
_SUM_TILE = ROW_MULTIPLE  # rows of gate and up whose sums one program adds; it divides any number of them


def choose_tilings(pairs_per_expert: float) -> tuple[Tiling, Tiling]:
    """Of gate and up, and of down, with the same `block_m`: by the mean number of pairs, so that most experts need one
    block. They are the fastest of many on an H200, for the shapes of DeepSeek-R1 on one of 8 ranks and Qwen3-30B-A3B
    on one. Columns are never shared out for down.
    """
    narrow = Tiling(16, 16, 64, 128, 4, 6, max_registers=128)
    wide = Tiling(16, 16, 128, 128, 4, 4, max_registers=128)
    if pairs_per_expert <= 0.1:
        return replace(narrow, programs_per_multiprocessor=12), narrow
    if pairs_per_expert <= 1:  # beyond, the sums of all ranks' pairs would take much memory
        return replace(wide, programs_per_multiprocessor=12), narrow if pairs_per_expert <= 0.15 else wide
    if pairs_per_expert <= 12:
        return wide, wide
    if pairs_per_expert <= 24:
        return (Tiling(32, 16, 128, 128, 4, 3, max_registers=128),) * 2
    if pairs_per_expert <= 90:
        return (Tiling(64, 32, 128, 128, 8, 3, max_registers=128),) * 2
    return (Tiling(128, 32, 64, 128, 4, 3),) * 2


class Nvfp4MoE:
    """The experts `first_expert`, … of a layer, packed.

    `num_experts` is the number of experts of the whole layer, by default of this rank; it only serves to guess how
    many pairs an expert gets. `dtype` is that of the result, and of the weighted result of each pair before they are
    added (in fp32). Block scales must not be negative.
    """

    def __init__(
        self,
        packed: PackedNvfp4Experts,
        first_expert: int,
        num_experts: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.first_expert, self.dtype = first_expert, dtype
        self.num_local, self.hidden_size = packed.w2.shape[:2]
        self.num_experts = num_experts or self.num_local
        self.w13 = _pack_stack(_interleave_gate_up(packed.w13), _interleave_gate_up(packed.w13_scales))
        self.w2 = _pack_stack(packed.w2, packed.w2_scales)
        self.g1_gate_up = packed.g1_gate_up / WEIGHT_UNIT
        self.w2_input_scale = packed.w2_input_scale
        self.g2 = packed.g2 / WEIGHT_UNIT

    def __call__(
        self, x_fp4: Tensor, x_scale: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The contract of `fused_moe_nvfp4`, with [S, H] of `dtype` as result, `out` if given; no rows launch nothing.

        `x_fp4` [S, H/2], `x_scale` [S, H/16], `topk_ids` and `topk_weights` [S, K] may be views of wire rows. FP8
        rows, a uint8 `out`, get the bytes of `quantize_fp8_rows` of the result.
        """
        if out is None:
            out = x_fp4.new_empty(x_fp4.shape[0], self.hidden_size, dtype=self.dtype)
        arguments = (x_fp4, x_scale, topk_ids, topk_weights, out)
        if len(out) > 0:
            cut = self.choose_cut(topk_ids.numel())  # one for all rows, so that they are summed alike
            for part in zip(*(tensor.split(_MAX_ROWS) for tensor in arguments), strict=True):
                self._run(cut, *part)
        return out

    def choose_cut(self, pairs: int) -> tuple[Tiling, Tiling, int]:
        """The tilings of both products, and into how many parts the columns of gate and up are cut, for that many pairs
        of all ranks.
        """
        tiling, down_tiling = choose_tilings(pairs / self.num_experts)
        likely_experts = max(1, min(self.num_local, pairs * self.num_local // self.num_experts))
        tiles = likely_experts * self.w13.rows // tiling.block_n
        programs = num_multiprocessors(self.w13.words.device) * tiling.programs_per_multiprocessor
        splits = max(1, min(_MAX_SPLITS, self.w13.columns // _SPLIT_COLUMNS, programs // tiles))
        return tiling, down_tiling, splits

    def _run(
        self,
        cut: tuple[Tiling, Tiling, int],
        x_fp4: Tensor,
        x_scale: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        out: Tensor,
    ) -> None:
        tiling, down_tiling, splits = cut
        rows, top_k = topk_ids.shape
        pairs = rows * top_k
        x = x_fp4.new_empty(rows, self.w13.columns, dtype=torch.float16)
        hidden = x.new_empty(pairs, self.w2.columns)
        gate_up_out = hidden if splits == 1 else x.new_empty(splits, pairs, self.w13.rows, dtype=torch.float32)
        results = out.new_empty(pairs, self.hidden_size, dtype=self.dtype)

        blocks = prepare(x_fp4, x_scale, topk_ids, self.first_expert, self.num_local, tiling.block_m, x)
        _gate_up_kernel[(blocks.max_blocks * self.w13.rows // tiling.block_n * splits,)](
            self.w13.words,
            self.w13.scales,
            self.g1_gate_up,
            self.w2_input_scale,
            x,
            blocks.pairs,
            blocks.experts_and_counts,
            blocks.num_blocks,
            gate_up_out,
            pairs,
            blocks.max_blocks,
            ROWS=self.w13.rows,
            COLUMNS=self.w13.columns,
            SPLITS=splits,
            TOP_K=top_k,
            BLOCK_M=tiling.block_m,
            SMALL_M=tiling.small_m,
            BLOCK_N=tiling.block_n,
            BLOCK_K=tiling.step(self.w13.columns),
            num_warps=tiling.num_warps,
            num_stages=tiling.stages(x.device),
            maxnreg=tiling.max_registers,
            launch_pdl=overlaps_predecessor(),
            enable_fp_fusion=False,
        )
        if splits > 1:
            _sum_splits_kernel[(pairs, self.w13.rows // _SUM_TILE)](
                gate_up_out,
                topk_ids,
                self.g1_gate_up,
                self.w2_input_scale,
                hidden,
                topk_ids.stride(0),
                topk_ids.stride(1),
                self.first_expert,
                NUM_EXPERTS=self.num_local,
                ROWS=self.w13.rows,
                SPLITS=splits,
                TOP_K=top_k,
                BLOCK_N=_SUM_TILE,
                num_warps=1,
                launch_pdl=overlaps_predecessor(),
                enable_fp_fusion=False,
            )
        _down_kernel[(blocks.max_blocks * self.w2.rows // down_tiling.block_n,)](
            self.w2.words,
            self.w2.scales,
            self.g2,
            topk_weights,
            hidden,
            blocks.pairs,
            blocks.experts_and_counts,
            blocks.num_blocks,
            results,
            topk_weights.stride(0),
            topk_weights.stride(1),
            blocks.max_blocks,
            HIDDEN_SIZE=self.hidden_size,
            ROWS=self.w2.rows,
            COLUMNS=self.w2.columns,
            TOP_K=top_k,
            BLOCK_M=down_tiling.block_m,
            SMALL_M=down_tiling.small_m,
            BLOCK_N=down_tiling.block_n,
            BLOCK_K=down_tiling.step(self.w2.columns),
            num_warps=down_tiling.num_warps,
            num_stages=down_tiling.stages(x.device),
            maxnreg=down_tiling.max_registers,
            launch_pdl=overlaps_predecessor(),
        )
        add_results(results, topk_ids, self.first_expert, self.num_local, out)


def _pack_stack(values: Tensor, scales: Tensor) -> NvFp4Tiles:
    """[E, N, K/2] and [E, N, K/16] to tiles of that many matrices."""
    experts = [pack_tiles(*matrix) for matrix in zip(values, scales, strict=True)]
    return NvFp4Tiles(
        words=torch.stack([tiles.words for tiles in experts]), scales=torch.stack([tiles.scales for tiles in experts])
    )


def _interleave_gate_up(w13: Tensor) -> Tensor:
    """Rows [E, 2I, …] as `_gate_up_kernel` takes them: [E, 2 I', …] with I' a padded I.

    Eight rows of gate alternate with the same eight of up. Of every 128 rows of either, those blocks of 16 come first
    that make up the lower half of each quarter: so a tile of 64 covers whole 32-byte runs of `hidden` in tile order.
    """
    experts, double_size, *rest = w13.shape
    size = double_size // 2
    padded = w13.new_zeros(experts, 2, padded_columns(size), *rest)
    padded[:, :, :size] = w13.view(experts, 2, size, *rest)
    blocks = padded.view(experts, 2, -1, 4, 2, 16, *rest).transpose(3, 4)
    eights = blocks.reshape(experts, 2, -1, 8, *rest)
    return eights.transpose(1, 2).reshape(experts, -1, *rest)


@triton.jit(do_not_specialize=["total_pairs", "max_blocks"])
def _gate_up_kernel(
    words_ptr,
    scales_ptr,
    alpha_ptr,
    hidden_scale_ptr,
    x_ptr,
    sorted_pairs_ptr,
    blocks_ptr,
    num_blocks_ptr,
    out_ptr,
    total_pairs,
    max_blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """With one split `out` are the hidden values, otherwise the sums of each, fp32 [SPLITS, total_pairs, ROWS]."""
    ROW_TILES: tl.constexpr = ROWS // BLOCK_N
    wait_for_predecessor()
    let_successor_start()
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    block, row_tile = tile // ROW_TILES, tile % ROW_TILES
    expert, num_pairs = load_block(block, blocks_ptr, max_blocks)
    if block < tl.load(num_blocks_ptr):
        if SMALL_M < BLOCK_M and num_pairs <= SMALL_M:
            _gate_up_tile(
                row_tile, split, expert, load_pairs(block, sorted_pairs_ptr, num_pairs, BLOCK_M, SMALL_M),
                words_ptr, scales_ptr, alpha_ptr, hidden_scale_ptr, x_ptr, out_ptr, total_pairs,
                ROWS, COLUMNS, SPLITS, TOP_K, SMALL_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _gate_up_tile(
                row_tile, split, expert, load_pairs(block, sorted_pairs_ptr, num_pairs, BLOCK_M, BLOCK_M),
                words_ptr, scales_ptr, alpha_ptr, hidden_scale_ptr, x_ptr, out_ptr, total_pairs,
                ROWS, COLUMNS, SPLITS, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _gate_up_tile(
    row_tile,
    split,
    expert,
    pairs,
    words_ptr,
    scales_ptr,
    alpha_ptr,
    hidden_scale_ptr,
    x_ptr,
    out_ptr,
    total_pairs,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    STEPS: tl.constexpr = COLUMNS // BLOCK_K
    pair, mask = pairs
    # Before the product, so that the end does not wait for them.
    factors = _load_factors(expert, alpha_ptr, hidden_scale_ptr)
    acc = multiply_rows(
        words_ptr + expert * (ROWS * COLUMNS // 4), scales_ptr + expert * (ROWS * COLUMNS // 16),
        row_tile * BLOCK_N, COLUMNS // 128, split * STEPS // SPLITS, (split + 1) * STEPS // SPLITS,
        x_ptr + (pair // TOP_K).to(tl.int64) * COLUMNS, mask, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    if SPLITS == 1:
        _quantize_hidden(acc, factors, row_tile, pairs, out_ptr, ROWS, BLOCK_M, BLOCK_N)
    else:
        sum_row = (split * total_pairs + pair).to(tl.int64)[:, None]
        sum_ptrs = out_ptr + sum_row * ROWS + row_tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(sum_ptrs, acc.T, mask=mask[:, None])


@triton.jit(do_not_specialize=["first_expert"])
def _sum_splits_kernel(
    sums_ptr,
    ids_ptr,
    alpha_ptr,
    hidden_scale_ptr,
    hidden_ptr,
    ids_stride,
    ids_slot_stride,
    first_expert,
    NUM_EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds, in order, what `_gate_up_kernel` has left of each split, and finishes its work.

    A program takes `BLOCK_N` rows of gate and up of one pair.
    """
    pair, row_tile = tl.program_id(0), tl.program_id(1)
    total_pairs = tl.num_programs(0)
    expert = tl.load(ids_ptr + pair // TOP_K * ids_stride + pair % TOP_K * ids_slot_stride) - first_expert
    is_local = (expert >= 0) & (expert < NUM_EXPERTS)
    factors = _load_factors(tl.where(is_local, expert, 0), alpha_ptr, hidden_scale_ptr)
    wait_for_predecessor()
    let_successor_start()
    if is_local:
        row = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros([BLOCK_N], tl.float32)
        for split in tl.static_range(SPLITS):
            acc += tl.load(sums_ptr + (split * total_pairs + pair).to(tl.int64) * ROWS + row)
        pairs = pair + tl.arange(0, 1), tl.full([1], True, tl.int1)
        _quantize_hidden(acc[:, None], factors, row_tile, pairs, hidden_ptr, ROWS, 1, BLOCK_N)


@triton.jit
def _load_factors(expert, alpha_ptr, hidden_scale_ptr):
    """What the sums of gate and of up are multiplied by, and the input scale of down."""
    return tl.load(alpha_ptr + expert * 2), tl.load(alpha_ptr + expert * 2 + 1), tl.load(hidden_scale_ptr + expert)


@triton.jit
def _quantize_hidden(
    acc,
    factors,
    row_tile,
    pairs,
    hidden_ptr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """SwiGLU and the second quantization of the sums [BLOCK_N, BLOCK_M] of a tile, left in `hidden`."""
    HIDDEN_BLOCKS: tl.constexpr = BLOCK_N // 32  # blocks of 16 hidden values
    pair, mask = pairs
    gate_alpha, up_alpha, hidden_scale = factors
    gate, up = tl.split(acc.reshape(BLOCK_N // 16, 2, 8, BLOCK_M).permute(0, 2, 3, 1))
    gate *= gate_alpha
    up *= up_alpha
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    hidden = fake_quantize(hidden.reshape(HIDDEN_BLOCKS, 16, BLOCK_M), hidden_scale, DIVIDE=False)

    # In a block of 16, value 8 b0 + 4 p + j; blocks t = 0 to 3 of a chunk with b1 = 0, then those with b1 = 1.
    hidden = hidden.reshape(HIDDEN_BLOCKS, 2, 2, 4, BLOCK_M).permute(4, 3, 1, 0, 2)  # pair, j, b0, t, p
    hidden = hidden.reshape(BLOCK_M, 4, 2, HIDDEN_BLOCKS * 2)
    first_block = row_tile * HIDDEN_BLOCKS
    place = first_block // 8 * 128 + first_block // 4 % 2 * 16 + first_block % 4 * 2
    hidden_ptrs = (hidden_ptr + pair.to(tl.int64) * (ROWS // 2) + place)[:, None, None, None]
    hidden_ptrs += tl.arange(0, 4)[None, :, None, None] * 32 + tl.arange(0, 2)[None, None, :, None] * 8
    hidden_ptrs += tl.arange(0, HIDDEN_BLOCKS * 2)[None, None, None, :]
    tl.store(hidden_ptrs, hidden, mask=mask[:, None, None, None])


@triton.jit(do_not_specialize=["max_blocks"])
def _down_kernel(
    words_ptr,
    scales_ptr,
    alpha_ptr,
    weights_ptr,
    hidden_ptr,
    sorted_pairs_ptr,
    blocks_ptr,
    num_blocks_ptr,
    results_ptr,
    weights_stride,
    weights_slot_stride,
    max_blocks,
    HIDDEN_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ROW_TILES: tl.constexpr = ROWS // BLOCK_N
    wait_for_predecessor()
    let_successor_start()
    block, row_tile = tl.program_id(0) // ROW_TILES, tl.program_id(0) % ROW_TILES
    expert, num_pairs = load_block(block, blocks_ptr, max_blocks)
    if block < tl.load(num_blocks_ptr):
        if SMALL_M < BLOCK_M and num_pairs <= SMALL_M:
            _down_tile(
                row_tile, expert, load_pairs(block, sorted_pairs_ptr, num_pairs, BLOCK_M, SMALL_M),
                words_ptr, scales_ptr, alpha_ptr, weights_ptr, hidden_ptr, results_ptr,
                weights_stride, weights_slot_stride, HIDDEN_SIZE, ROWS, COLUMNS, TOP_K, SMALL_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _down_tile(
                row_tile, expert, load_pairs(block, sorted_pairs_ptr, num_pairs, BLOCK_M, BLOCK_M),
                words_ptr, scales_ptr, alpha_ptr, weights_ptr, hidden_ptr, results_ptr,
                weights_stride, weights_slot_stride, HIDDEN_SIZE, ROWS, COLUMNS, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit
def _down_tile(
    row_tile,
    expert,
    pairs,
    words_ptr,
    scales_ptr,
    alpha_ptr,
    weights_ptr,
    hidden_ptr,
    results_ptr,
    weights_stride,
    weights_slot_stride,
    HIDDEN_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pair, mask = pairs
    row = pair // TOP_K
    weight_ptr = weights_ptr + row * weights_stride + (pair - row * TOP_K) * weights_slot_stride
    # Before the product, so that the end does not wait for them.
    factor = tl.load(alpha_ptr + expert) * tl.load(weight_ptr, mask=mask, other=0.0)
    acc = multiply_rows(
        words_ptr + expert * (ROWS * COLUMNS // 4), scales_ptr + expert * (ROWS * COLUMNS // 16),
        row_tile * BLOCK_N, COLUMNS // 128, 0, COLUMNS // BLOCK_K,
        hidden_ptr + pair.to(tl.int64) * COLUMNS, mask, BLOCK_N, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    column = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    result_ptrs = results_ptr + pair.to(tl.int64)[:, None] * HIDDEN_SIZE + column[None, :]
    result = (acc * factor[None, :]).T.to(results_ptr.dtype.element_ty)
    tl.store(result_ptrs, result, mask=mask[:, None] & (column < HIDDEN_SIZE)[None, :])
