"""The beginning of the experts: which pairs of rows and experts are this rank's, block by block, and rows in fp16.

Where there are many pairs, a second kernel places what the first has counted. Both begin a chain of
`nibble.kernels.triton.dependent_launch`, whose next link they let start.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.triton.dependent_launch import let_successor_start, overlaps_predecessor
from nibble.kernels.triton.moe_routing import COUNTED_TILES, RANK_TILE, assign, choose_assign_tile, count, place_kernel
from nibble.kernels.triton.nvfp4_tiles import e2m1_value, e4m3_value

_UNPACK_TILE = 1024  # words of eight values that one program unpacks


@dataclass(frozen=True)
class Blocks:
    """Pairs of this rank's experts, as `moe_routing` describes them."""

    pairs: Tensor  # int32 [max_blocks, block_m]
    experts_and_counts: Tensor  # int32 [2, max_blocks]
    num_blocks: Tensor  # int32 [1]

    @property
    def max_blocks(self) -> int:
        return self.pairs.shape[0]


def prepare(
    x_fp4: Tensor, x_scale: Tensor, topk_ids: Tensor, first_expert: int, num_experts: int, block_m: int, x: Tensor
) -> Blocks:
    """The blocks of the experts `first_expert`, …; the rows are unpacked into `x` fp16 [S, padded H], in tile order.

    `x_fp4` uint8 [S, H/2], `x_scale` [S, H/16], `topk_ids` int32 [S, K]. With no columns in `x` nothing is unpacked.
    """
    rows, top_k = topk_ids.shape
    pairs = rows * top_k
    # Every expert with pairs may leave one block partly empty.
    used_experts = min(pairs, num_experts)
    max_blocks = used_experts + (pairs - used_experts) // block_m
    blocks = Blocks(topk_ids.new_empty(max_blocks, block_m), topk_ids.new_empty(2, max_blocks), topk_ids.new_empty(1))
    x_fp4 = _word_aligned(x_fp4)
    assign_tile = choose_assign_tile(pairs)
    assign_programs = triton.cdiv(pairs, assign_tile)
    expert_tile = triton.next_power_of_2(num_experts)
    counts = topk_ids.new_empty(assign_programs, expert_tile)
    experts = {
        "TOP_K": top_k, "NUM_EXPERTS": num_experts, "EXPERT_TILE": expert_tile, "BLOCK_M": block_m,
        "ASSIGN_TILE": assign_tile,
    }  # fmt: skip
    _prepare_kernel[(assign_programs + triton.cdiv(rows * x.shape[1] // 8, _UNPACK_TILE),)](
        x_fp4,
        x_scale.view(torch.uint8),
        topk_ids,
        blocks.pairs,
        blocks.experts_and_counts,
        blocks.num_blocks,
        counts,
        x,
        x_fp4.stride(0),
        x_scale.stride(0),
        topk_ids.stride(0),
        topk_ids.stride(1),
        rows,
        first_expert,
        max_blocks,
        assign_programs,
        HIDDEN_SIZE=x_fp4.shape[1] * 2,
        PADDED_SIZE=x.shape[1],
        **experts,
        ONE_TILE=assign_programs == 1,
        UNPACK_TILE=_UNPACK_TILE,
        num_warps=8,
    )
    if assign_programs > 1:
        place_kernel[(assign_programs,)](
            topk_ids,
            counts,
            blocks.pairs,
            blocks.experts_and_counts,
            blocks.num_blocks,
            topk_ids.stride(0),
            topk_ids.stride(1),
            pairs,
            first_expert,
            max_blocks,
            **experts,
            RANK_TILE=min(RANK_TILE, assign_tile),
            COUNTED_TILES=COUNTED_TILES,
            num_warps=8,
            launch_pdl=overlaps_predecessor(),
        )
    return blocks


def _word_aligned(x_fp4: Tensor) -> Tensor:
    """`x_fp4`, with rows that can be read in words of 4 bytes. Copies only if it has to."""
    aligned = x_fp4.stride(1) == 1 and x_fp4.stride(0) % 4 == 0 and x_fp4.data_ptr() % 4 == 0
    return x_fp4 if aligned else x_fp4.clone(memory_format=torch.contiguous_format)


@triton.jit(do_not_specialize=["num_rows", "first_expert", "max_blocks", "assign_programs"])
def _prepare_kernel(
    x_fp4_ptr,
    x_scale_ptr,
    ids_ptr,
    sorted_pairs_ptr,
    blocks_ptr,
    num_blocks_ptr,
    counts_ptr,
    x_ptr,
    x_fp4_stride,
    x_scale_stride,
    ids_stride,
    ids_slot_stride,
    num_rows,
    first_expert,
    max_blocks,
    assign_programs,
    HIDDEN_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERT_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ASSIGN_TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    UNPACK_TILE: tl.constexpr,
):
    let_successor_start()
    program = tl.program_id(0)
    if program < assign_programs:
        if ONE_TILE:
            assign(
                ids_ptr, sorted_pairs_ptr, blocks_ptr, num_blocks_ptr, ids_stride, ids_slot_stride,
                num_rows * TOP_K, first_expert, max_blocks, TOP_K, NUM_EXPERTS, BLOCK_M, ASSIGN_TILE,
            )  # fmt: skip
        else:
            count(
                program, ids_ptr, counts_ptr, ids_stride, ids_slot_stride, num_rows * TOP_K, first_expert,
                TOP_K, NUM_EXPERTS, EXPERT_TILE, ASSIGN_TILE,
            )  # fmt: skip
    else:
        if PADDED_SIZE > 0:
            _unpack_rows(
                program - assign_programs, x_fp4_ptr, x_scale_ptr, x_ptr, x_fp4_stride, x_scale_stride, num_rows,
                HIDDEN_SIZE, PADDED_SIZE, UNPACK_TILE,
            )  # fmt: skip


@triton.jit
def _unpack_rows(
    tile,
    x_fp4_ptr,
    x_scale_ptr,
    x_ptr,
    x_fp4_stride,
    x_scale_stride,
    num_rows,
    HIDDEN_SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Words of eight codes to fp16 in tile order, zeros for padding.

    Values of four words each come side by side: of the words k, k + 4, k + 8 and k + 12 of a chunk.
    """
    ROW_RUNS: tl.constexpr = PADDED_SIZE // 32
    index = tile * (TILE // 4) + tl.arange(0, TILE // 4)
    row = (index // ROW_RUNS).to(tl.int64)[:, None]
    run = (index % ROW_RUNS)[:, None]
    column = run // 4 * 16 + run % 4 + tl.arange(0, 4)[None, :] * 4
    in_row = row < num_rows
    mask = in_row & (column < HIDDEN_SIZE // 8)
    word_ptr = (x_fp4_ptr + row * x_fp4_stride).to(tl.pointer_type(tl.int32), bitcast=True) + column
    word = tl.load(word_ptr, mask=mask, other=0)
    scale_byte = tl.load(x_scale_ptr + row * x_scale_stride + column // 2, mask=mask, other=0)
    scale = e4m3_value(scale_byte.to(tl.int32)) * 2.0**14
    place_ptr = x_ptr + row * PADDED_SIZE + run // 4 * 128 + run % 4 * 8 + tl.arange(0, 8)[None, :]
    for j in tl.static_range(4):  # code 4 p + j of a word
        even = e2m1_value((word >> (4 * j)) & 15) * scale
        odd = e2m1_value((word >> (4 * j + 16)) & 15) * scale
        values = tl.join(even, odd).to(tl.float16).reshape(TILE // 4, 8)
        tl.store(place_ptr + 32 * j, values, mask=in_row)
