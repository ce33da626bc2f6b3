"""Combine through peer memory: one kernel sums this rank's rows of every rank's partial results."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.distributed.peer_memory import PeerMemory
from nibble.kernels.triton.peer_sync import (
    enter_round,
    finish_round,
    is_last_program,
    meet_kernel,
    next_round,
    segment_of,
    wait_for_round,
)

# With few rows the programs that sum wait by themselves, which saves a launch. So few of them that they leave half of
# the multiprocessors to the kernels they wait for, those of other ranks of the same GPU among them.
_WAITING_TILE, _WAITING_WARPS = 4096, 16
_MAX_TILES_PER_WAITING_PROGRAM = 4
_TILE, _NUM_WARPS = 1024, 4


def peer_combine(memory: PeerMemory, sizes: Sequence[int]) -> Tensor:
    """This rank's rows of the sum over all ranks of `memory.partial(sum(sizes))`: bf16 [sizes[rank], H].

    Terms are added in fp32 in the order of the ranks and rounded once. Collective, without host synchronization: a
    CUDA graph can capture it. A rank without rows takes part; without rows on any rank nothing is launched. The
    partial results may be written again after the next `peer_dispatch`.
    """
    hidden_size = memory.layout.hidden_size
    num_rows = sizes[memory.rank]
    out = torch.empty(num_rows, hidden_size, dtype=torch.bfloat16, device=memory.segment.device)
    if not any(sizes):
        return out
    tiles = num_rows * triton.cdiv(hidden_size, _WAITING_TILE)
    waiting_programs = max(1, memory.num_multiprocessors // (2 * memory.ranks_per_gpu))
    if tiles <= _MAX_TILES_PER_WAITING_PROGRAM * waiting_programs:
        programs, tile, num_warps, meets = max(1, min(tiles, waiting_programs)), _WAITING_TILE, _WAITING_WARPS, True
    else:
        meet_kernel[(1,)](memory.segment, memory.rank, WORLD_SIZE=memory.world_size, num_warps=1)
        tile, num_warps, meets = _TILE, _NUM_WARPS, False
        programs = num_rows * triton.cdiv(hidden_size, tile)
    _combine_kernel[(programs,)](
        out,
        memory.segment,
        memory.rank,
        sum(sizes[: memory.rank]),
        num_rows,
        WORLD_SIZE=memory.world_size,
        PARTIAL_OFFSET=memory.layout.partial_offset,
        HIDDEN_SIZE=hidden_size,
        TILE=tile,
        MEETS=meets,
        num_warps=num_warps,
    )
    return out


@triton.jit(do_not_specialize=["rank", "first_row", "num_rows"])
def _combine_kernel(
    out_ptr,
    segment_ptr,
    rank,
    first_row,
    num_rows,
    WORLD_SIZE: tl.constexpr,
    PARTIAL_OFFSET: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MEETS: tl.constexpr,
):
    """Tiles of `TILE` columns of a row. With `MEETS` every program waits for the round that the first one enters."""
    TILES_PER_ROW: tl.constexpr = (HIDDEN_SIZE + TILE - 1) // TILE
    number = 0
    if MEETS:
        number = next_round(segment_ptr)
        if tl.program_id(0) == 0:
            enter_round(number, segment_ptr, rank, WORLD_SIZE)
        wait_for_round(number, segment_ptr, rank, WORLD_SIZE)
    for tile in range(tl.program_id(0), num_rows * TILES_PER_ROW, tl.num_programs(0)):
        row = tl.cast(tile // TILES_PER_ROW, tl.int64)
        column = tile % TILES_PER_ROW * TILE + tl.arange(0, TILE)
        offset = (first_row + row) * HIDDEN_SIZE
        acc = _load_partial(0, offset, column, segment_ptr, WORLD_SIZE, PARTIAL_OFFSET, HIDDEN_SIZE)
        for peer in tl.static_range(1, WORLD_SIZE):
            acc += _load_partial(peer, offset, column, segment_ptr, WORLD_SIZE, PARTIAL_OFFSET, HIDDEN_SIZE)
        tl.store(out_ptr + row * HIDDEN_SIZE + column, acc.to(tl.bfloat16), mask=column < HIDDEN_SIZE)
    if MEETS:  # noqa: SIM102 - decided when the kernel is compiled
        if is_last_program(segment_ptr):
            finish_round(number, segment_ptr)


@triton.jit
def _load_partial(
    peer,
    offset,
    column,
    segment_ptr,
    WORLD_SIZE: tl.constexpr,
    PARTIAL_OFFSET: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
):
    """fp32, `column` of the row at `offset` of a rank's partial results."""
    partial = segment_of(peer, segment_ptr, WORLD_SIZE) + PARTIAL_OFFSET
    row_ptr = tl.multiple_of(partial.to(tl.pointer_type(tl.bfloat16)), 16) + offset
    return tl.load(row_ptr + column, mask=column < HIDDEN_SIZE, other=0.0).to(tl.float32)
