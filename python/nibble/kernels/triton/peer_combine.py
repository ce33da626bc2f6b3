"""Combine through peer memory: one kernel sums this rank's rows of every rank's partial results."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.distributed.peer_memory import PeerMemory
from nibble.kernels.triton.peer_sync import meet_kernel, segment_of


@dataclass(frozen=True)
class Tiling:
    """How the kernel that sums is cut up. Each thread has its terms of all ranks on their way at once."""

    columns: int = 1024  # of a row, that a program sums at a time
    num_warps: int = 4
    max_registers: int = 64  # a thread; with fewer the compiler adds before it has asked for all terms
    rotates: bool = True  # ranks begin with different peers: their own
    rows_first: bool = True  # neighbouring programs take the same columns of neighbouring rows
    eviction: str = "evict_first"  # of the terms, which nobody reads again
    programs_per_multiprocessor: int = 0  # 0: a program for every tile


TILING = Tiling()


def peer_combine(memory: PeerMemory, sizes: Sequence[int]) -> Tensor:
    """This rank's rows of the sum over all ranks of `memory.partial(sum(sizes))`: bf16 [sizes[rank], H].

    Terms are added in fp32 in the order of the ranks and rounded once. Collective, without host synchronization: a
    CUDA graph can capture it. A rank without rows takes part; without rows on any rank nothing is launched. The
    partial results may be overwritten once this rank has entered another round, which `peer_dispatch` does.
    """
    num_rows, hidden_size = sizes[memory.rank], memory.layout.hidden_size
    out = torch.empty(num_rows, hidden_size, dtype=torch.bfloat16, device=memory.segment.device)
    if not any(sizes):
        return out
    peer_meet(memory)
    if num_rows == 0:
        return out
    programs = num_rows * triton.cdiv(hidden_size, TILING.columns)
    if TILING.programs_per_multiprocessor:
        programs = min(programs, TILING.programs_per_multiprocessor * memory.num_multiprocessors)
    _peer_sum_kernel[(programs,)](
        out,
        memory.segment,
        sum(sizes[: memory.rank]),
        num_rows,
        WORLD_SIZE=memory.world_size,
        FIRST_PEER=memory.rank if TILING.rotates else 0,
        PARTIAL_OFFSET=memory.layout.partial_offset,
        HIDDEN_SIZE=hidden_size,
        TILE=TILING.columns,
        ROWS_FIRST=TILING.rows_first,
        EVICTION=TILING.eviction,
        num_warps=TILING.num_warps,
        maxnreg=TILING.max_registers,
    )
    return out


def peer_meet(memory: PeerMemory) -> None:
    """Lets kernels that follow see what all ranks have stored in the segments before they came here."""
    meet_kernel[(1,)](memory.segment, memory.rank, WORLD_SIZE=memory.world_size, num_warps=1)


@triton.jit(do_not_specialize=["first_row", "num_rows"])
def _peer_sum_kernel(
    out_ptr,
    segment_ptr,
    first_row,
    num_rows,
    WORLD_SIZE: tl.constexpr,
    FIRST_PEER: tl.constexpr,
    PARTIAL_OFFSET: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Tiles of `TILE` columns of a row. Terms are loaded from `FIRST_PEER` on, and added from rank 0 on."""
    TILES_PER_ROW: tl.constexpr = (HIDDEN_SIZE + TILE - 1) // TILE
    for tile in range(tl.program_id(0), num_rows * TILES_PER_ROW, tl.num_programs(0)):
        row = tl.cast(tile % num_rows if ROWS_FIRST else tile // TILES_PER_ROW, tl.int64)
        first_column = (tile // num_rows if ROWS_FIRST else tile % TILES_PER_ROW) * TILE
        column = first_column + tl.arange(0, TILE)
        mask = column < HIDDEN_SIZE
        offset = (first_row + row) * HIDDEN_SIZE
        terms = ()
        for step in tl.static_range(WORLD_SIZE):
            partial = segment_of((FIRST_PEER + step) % WORLD_SIZE, segment_ptr, WORLD_SIZE) + PARTIAL_OFFSET
            row_ptr = tl.multiple_of(partial.to(tl.pointer_type(tl.bfloat16)), 16) + offset
            term = tl.load(row_ptr + column, mask=mask, other=0.0, eviction_policy=EVICTION)
            terms = terms + (term,)  # type: ignore[assignment]  # noqa: RUF005
        acc: tl.tensor = terms[(WORLD_SIZE - FIRST_PEER) % WORLD_SIZE].to(tl.float32)
        for peer in tl.static_range(1, WORLD_SIZE):
            acc += terms[(WORLD_SIZE - FIRST_PEER + peer) % WORLD_SIZE].to(tl.float32)
        tl.store(out_ptr + row * HIDDEN_SIZE + column, acc.to(tl.bfloat16), mask=mask)
