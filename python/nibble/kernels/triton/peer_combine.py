"""Combine through peer memory: one kernel sums this rank's rows of every rank's partial results."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.distributed.peer_memory import PeerMemory
from nibble.kernels.triton.peer_sync import meet_kernel, segment_of

_TILE = 1024  # columns of a row that a program sums, 16 bytes of every rank's a thread
_MAX_REGISTERS = 64  # a thread; with fewer the compiler adds before it has asked for the terms of all ranks


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
    _peer_sum_kernel[(num_rows * triton.cdiv(hidden_size, _TILE),)](
        out,
        memory.segment,
        sum(sizes[: memory.rank]),
        WORLD_SIZE=memory.world_size,
        PARTIAL_OFFSET=memory.layout.partial_offset,
        HIDDEN_SIZE=hidden_size,
        TILE=_TILE,
        num_warps=4,
        maxnreg=_MAX_REGISTERS,
    )
    return out


def peer_meet(memory: PeerMemory) -> None:
    """Lets kernels that follow see what all ranks have stored in the segments before they came here."""
    meet_kernel[(1,)](memory.segment, memory.rank, WORLD_SIZE=memory.world_size, num_warps=1)


@triton.jit(do_not_specialize=["first_row"])
def _peer_sum_kernel(
    out_ptr,
    segment_ptr,
    first_row,
    WORLD_SIZE: tl.constexpr,
    PARTIAL_OFFSET: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program for each `TILE` columns of a row, neighbours on the same row."""
    TILES_PER_ROW: tl.constexpr = (HIDDEN_SIZE + TILE - 1) // TILE
    row = tl.cast(tl.program_id(0) // TILES_PER_ROW, tl.int64)
    column = tl.program_id(0) % TILES_PER_ROW * TILE + tl.arange(0, TILE)
    mask = column < HIDDEN_SIZE
    terms = ()
    for peer in tl.static_range(WORLD_SIZE):  # all on their way before the first is added
        partial = segment_of(peer, segment_ptr, WORLD_SIZE) + PARTIAL_OFFSET
        row_ptr = tl.multiple_of(partial.to(tl.pointer_type(tl.bfloat16)), 16) + (first_row + row) * HIDDEN_SIZE
        term = tl.load(row_ptr + column, mask=mask, other=0.0, eviction_policy="evict_first")
        terms = terms + (term,)  # type: ignore[assignment]  # noqa: RUF005
    acc: tl.tensor = terms[0].to(tl.float32)  # type: ignore[misc]
    for peer in tl.static_range(1, WORLD_SIZE):
        acc += terms[peer].to(tl.float32)
    tl.store(out_ptr + row * HIDDEN_SIZE + column, acc.to(tl.bfloat16), mask=mask)
