"""Dispatch through peer memory: one kernel quantizes this rank's rows and stores them in every rank's segment.

Where peer memory reaches the ranks of one of several hosts, rows come from the other hosts as wire rows, and a kernel
stores those of this rank's rail (`rail.py`).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from nibble.distributed.peer_memory import PeerMemory
from nibble.kernels.torch.nvfp4 import BLOCK_SIZE
from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.triton.peer_sync import is_last_program, meet, segment_of
from nibble.kernels.triton.rail import place_of, rail_places
from nibble.kernels.triton.wire_row import copy_routing, load_blocks, load_input_scale, quantize_blocks, value_pairs

# A program takes whole rows, one block of 16 values a thread, and several rows where there are many: at its end it
# waits for its stores to arrive.
_PROGRAMS_PER_MULTIPROCESSOR = 1
_MAX_WARPS = 16
_MAX_REGISTERS = 64  # a thread, so that a multiprocessor runs two programs of 16 warps
_NOBODY = tl.constexpr(-1)


def peer_dispatch(
    memory: PeerMemory,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    input_scale: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """The bytes of `quantize_pack` of every rank's rows, in rank order: uint8 [sum(sizes), row_bytes].

    Takes the arguments of `quantize_pack`; `sizes` are the rows of all ranks, the same on each. Collective, without
    host synchronization: a CUDA graph can capture it. A rank without rows takes part; without rows on any rank nothing
    is launched. The result is memory of the segment: peers overwrite it once this rank has entered another round and
    they have, so it is to be read before `peer_combine`. Between two dispatches of a step there must be a combine.
    """
    num_rows, hidden_size = x.shape
    layout = WireRowLayout(hidden_size=hidden_size, top_k=topk_ids.shape[1])
    gathered = memory.rows(sum(sizes), layout.row_bytes)
    assert num_rows == sizes[memory.rank]
    if len(gathered) == 0:
        return gathered
    blocks_per_row = hidden_size // BLOCK_SIZE
    tile_blocks = triton.next_power_of_2(blocks_per_row)
    _dispatch_kernel[_grid(memory, num_rows)](
        value_pairs(x),
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        input_scale,
        memory.segment,
        memory.rank,
        sum(sizes[: memory.rank]),
        num_rows,
        WORLD_SIZE=memory.world_size,
        PEERS_TILE=triton.next_power_of_2(memory.world_size),
        ROWS_OFFSET=memory.layout.rows_offset,
        BLOCKS_PER_ROW=blocks_per_row,
        TOP_K=layout.top_k,
        SCALE_OFFSET=layout.scale_offset,
        IDS_OFFSET=layout.ids_offset,
        ROW_BYTES=layout.row_bytes,
        TILE_BLOCKS=tile_blocks,
        ROUTING_TILE=triton.next_power_of_2((layout.row_bytes - layout.ids_offset) // 4),
        ROW_TILE=triton.next_power_of_2(layout.row_bytes // 4),
        num_warps=min(_MAX_WARPS, max(1, tile_blocks // 32)),
        maxnreg=_MAX_REGISTERS,
        enable_fp_fusion=False,
    )
    return gathered


def peer_store(memory: PeerMemory, rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """The wire rows of all ranks of all hosts, in rank order, where each rank of a host brings those of its rail.

    `rows` is contiguous, uint8 [sum(rail_sizes(memory, sizes)), row_bytes], by host. The result is that of
    `peer_dispatch`, and everything that is said there holds here.
    """
    num_rows, row_bytes = rows.shape
    gathered = memory.rows(sum(sizes), row_bytes)
    if len(gathered) == 0:
        return gathered
    row_tile = triton.next_power_of_2(row_bytes // 4)
    _store_kernel[_grid(memory, num_rows)](
        rows,
        memory.segment,
        memory.rank,
        num_rows,
        rail_places(memory, sizes),
        WORLD_SIZE=memory.world_size,
        PEERS_TILE=triton.next_power_of_2(memory.world_size),
        ROWS_OFFSET=memory.layout.rows_offset,
        ROW_BYTES=row_bytes,
        ROW_TILE=row_tile,
        num_warps=min(_MAX_WARPS, max(1, row_tile // 128)),  # a word of 16 bytes a thread
        maxnreg=_MAX_REGISTERS,
    )
    return gathered


def _grid(memory: PeerMemory, num_rows: int) -> tuple[int]:
    return (max(1, min(num_rows, _PROGRAMS_PER_MULTIPROCESSOR * memory.num_multiprocessors)),)


@triton.jit(do_not_specialize=["rank", "first_row", "num_rows"])
def _dispatch_kernel(
    x_ptr,
    ids_ptr,
    weights_ptr,
    input_scale_ptr,
    segment_ptr,
    rank,
    first_row,
    num_rows,
    WORLD_SIZE: tl.constexpr,
    PEERS_TILE: tl.constexpr,
    ROWS_OFFSET: tl.constexpr,
    BLOCKS_PER_ROW: tl.constexpr,
    TOP_K: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    IDS_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ROUTING_TILE: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Each row is packed in the own segment, then copied from there to the others in words of 16 bytes."""
    own_offset = ROWS_OFFSET + first_row.to(tl.int64) * ROW_BYTES  # of this rank's rows, in every segment
    rows_ptr = segment_ptr + own_offset
    column = tl.arange(0, TILE_BLOCKS)
    is_block = column < BLOCKS_PER_ROW
    word = tl.arange(0, ROUTING_TILE)
    input_scale, corrections, multiply = load_input_scale(input_scale_ptr, x_ptr)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        block = row * BLOCKS_PER_ROW + column
        low, high = load_blocks(block, is_block, x_ptr)
        quantize_blocks(
            block, is_block, low, high, input_scale, corrections, multiply, rows_ptr,
            BLOCKS_PER_ROW, SCALE_OFFSET, ROW_BYTES,
        )  # fmt: skip
        copy_routing(
            row + tl.zeros_like(word), word, word < (ROW_BYTES - IDS_OFFSET) // 4, ids_ptr, weights_ptr, rows_ptr,
            TOP_K, SCALE_OFFSET + BLOCKS_PER_ROW, IDS_OFFSET, ROW_BYTES,
        )  # fmt: skip
        tl.debug_barrier()  # the row is whole
        offset = own_offset + tl.cast(row, tl.int64) * ROW_BYTES
        _push(segment_ptr + offset, offset, segment_ptr, rank, WORLD_SIZE, PEERS_TILE, ROW_BYTES, ROW_TILE)
    if is_last_program(segment_ptr):
        meet(segment_ptr, rank, WORLD_SIZE)


@triton.jit(do_not_specialize=["rank", "num_rows"])
def _store_kernel(
    rows_ptr,
    segment_ptr,
    rank,
    num_rows,
    places,
    WORLD_SIZE: tl.constexpr,
    PEERS_TILE: tl.constexpr,
    ROWS_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row_ptr = tl.multiple_of(rows_ptr + tl.cast(row, tl.int64) * ROW_BYTES, 16)
        offset = ROWS_OFFSET + place_of(row, places) * ROW_BYTES
        _push(row_ptr, offset, segment_ptr, _NOBODY, WORLD_SIZE, PEERS_TILE, ROW_BYTES, ROW_TILE)
    if is_last_program(segment_ptr):
        meet(segment_ptr, rank, WORLD_SIZE)


@triton.jit
def _push(
    row_ptr,
    offset,
    segment_ptr,
    has_it,
    WORLD_SIZE: tl.constexpr,
    PEERS_TILE: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROW_TILE: tl.constexpr,
):
    """Copies a row to `offset` in all segments but that of the rank which has it there."""
    word = tl.arange(0, ROW_TILE)
    is_word = word < ROW_BYTES // 4
    words = tl.load(row_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + word, mask=is_word)
    peer = tl.arange(0, PEERS_TILE)
    there_ptr = tl.multiple_of((segment_of(peer, segment_ptr, WORLD_SIZE) + offset).to(tl.pointer_type(tl.int32)), 16)
    is_target = (peer < WORLD_SIZE) & (peer != has_it)
    target_ptr = there_ptr[:, None] + word[None, :]
    values = tl.broadcast_to(words[None, :], PEERS_TILE, ROW_TILE)
    tl.store(target_ptr, values, mask=is_target[:, None] & is_word[None, :])
