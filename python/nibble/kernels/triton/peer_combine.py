"""Combine through peer memory: one kernel sums this rank's rows of every rank's partial results.

Where peer memory reaches the ranks of one of several hosts, it sums the rows of this rank's rail (`rail.py`), and
another kernel sums what the hosts have of this rank's own rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.distributed.peer_memory import PeerMemory
from nibble.kernels.torch.fp8_row import Fp8RowLayout
from nibble.kernels.triton.fp8_row import TILE, add_tiles, load_tile, store_sum
from nibble.kernels.triton.peer_sync import has_failed, meet_kernel, segment_of
from nibble.kernels.triton.rail import place_of, rail_places, rail_sizes

_MAX_REGISTERS = 64  # a thread; with fewer the compiler adds before it has asked for the terms of all ranks


def peer_combine(memory: PeerMemory, sizes: Sequence[int]) -> Tensor:
    """This rank's rows of the sum over all ranks of `memory.partial(sum(sizes))`: bf16 [sizes[rank], H].

    With `sizes` of several hosts the sum is over the ranks of this host, and its rows are those of the rail, by host;
    NaN if a rank of this host has not come, since the other hosts do not hear of it here.
    Terms, bf16 or FP8 rows, are added in fp32 in the order of the ranks, and the sum is rounded once. Collective,
    without host synchronization: a CUDA graph can capture it. A rank without rows takes part; without rows on any rank
    nothing is launched. The partial results may be overwritten once this rank has entered another round, which
    `peer_dispatch` does.
    """
    num_rows, hidden_size = sum(rail_sizes(memory, sizes)), memory.layout.hidden_size
    out = torch.empty(num_rows, hidden_size, dtype=torch.bfloat16, device=memory.segment.device)
    if not any(sizes):
        return out
    peer_meet(memory)
    if num_rows == 0:
        return out
    arguments = out, memory.segment, rail_places(memory, sizes)
    constants = {
        "WORLD_SIZE": memory.world_size,
        "PARTIAL_OFFSET": memory.layout.partial_offset,
        "HIDDEN_SIZE": hidden_size,
        "TILE": TILE,
        "num_warps": 4,
        "maxnreg": _MAX_REGISTERS,
    }
    grid = (num_rows * triton.cdiv(hidden_size, TILE),)
    if memory.layout.fp8_partial:
        layout = Fp8RowLayout(hidden_size)
        _peer_sum_fp8_kernel[grid](
            *arguments, SCALE_OFFSET=layout.scale_offset, ROW_BYTES=layout.row_bytes, **constants
        )
    else:
        _peer_sum_kernel[grid](*arguments, **constants)
    return out


def sum_over_hosts(terms: Tensor, num_hosts: int) -> Tensor:
    """Sums of T rows, of each host's in order: bf16 [num_hosts * T, H] to [T, H].

    They are added in fp32 and rounded once. No host synchronization, so a CUDA graph can capture it; no rows launch
    nothing.
    """
    num_rows, hidden_size = terms.shape[0] // num_hosts, terms.shape[1]
    out = terms.new_empty(num_rows, hidden_size)
    if num_rows:
        _sum_over_hosts_kernel[(num_rows * triton.cdiv(hidden_size, TILE),)](
            out, terms, num_rows, NUM_HOSTS=num_hosts, HIDDEN_SIZE=hidden_size, TILE=TILE, num_warps=4
        )
    return out


def peer_meet(memory: PeerMemory) -> None:
    """Lets kernels that follow see what all ranks have stored in the segments before they came here."""
    meet_kernel[(1,)](memory.segment, memory.rank, WORLD_SIZE=memory.world_size, num_warps=1)


@triton.jit
def _peer_sum_kernel(
    out_ptr,
    segment_ptr,
    places,
    WORLD_SIZE: tl.constexpr,
    PARTIAL_OFFSET: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program for each `TILE` columns of a row, neighbours on the same row."""
    TILES_PER_ROW: tl.constexpr = (HIDDEN_SIZE + TILE - 1) // TILE
    row = tl.cast(tl.program_id(0) // TILES_PER_ROW, tl.int64)
    place = place_of(row, places)
    column = tl.program_id(0) % TILES_PER_ROW * TILE + tl.arange(0, TILE)
    mask = column < HIDDEN_SIZE
    terms = ()
    for peer in tl.static_range(WORLD_SIZE):  # all on their way before the first is added
        partial = segment_of(peer, segment_ptr, WORLD_SIZE) + PARTIAL_OFFSET
        row_ptr = tl.multiple_of(partial.to(tl.pointer_type(tl.bfloat16)), 16) + place * HIDDEN_SIZE
        term = tl.load(row_ptr + column, mask=mask, other=0.0, eviction_policy="evict_first")
        terms = terms + (term,)  # type: ignore[assignment]  # noqa: RUF005
    acc = _unless_failed(_add(terms, WORLD_SIZE), segment_ptr, places)
    tl.store(out_ptr + row * HIDDEN_SIZE + column, acc.to(tl.bfloat16), mask=mask)


@triton.jit
def _peer_sum_fp8_kernel(
    out_ptr,
    segment_ptr,
    places,
    WORLD_SIZE: tl.constexpr,
    PARTIAL_OFFSET: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """The same of FP8 rows."""
    TILES_PER_ROW: tl.constexpr = (HIDDEN_SIZE + TILE - 1) // TILE
    row = tl.cast(tl.program_id(0) // TILES_PER_ROW, tl.int64)
    place = place_of(row, places)
    tile = tl.program_id(0) % TILES_PER_ROW
    values, scales = (), ()
    for peer in tl.static_range(WORLD_SIZE):
        partial = segment_of(peer, segment_ptr, WORLD_SIZE) + PARTIAL_OFFSET
        row_ptr = tl.multiple_of(partial.to(tl.pointer_type(tl.uint8)), 16) + place * ROW_BYTES
        value, scale = load_tile(tile, row_ptr, HIDDEN_SIZE, SCALE_OFFSET, TILE)
        values, scales = values + (value,), scales + (scale,)  # type: ignore[assignment]  # noqa: RUF005
    acc = _unless_failed(add_tiles(values, scales, WORLD_SIZE), segment_ptr, places)
    store_sum(acc, tile, out_ptr + row * HIDDEN_SIZE, HIDDEN_SIZE, TILE)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_over_hosts_kernel(
    out_ptr,
    terms_ptr,
    num_rows,
    NUM_HOSTS: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program for each `TILE` columns of a row."""
    TILES_PER_ROW: tl.constexpr = (HIDDEN_SIZE + TILE - 1) // TILE
    row = tl.cast(tl.program_id(0) // TILES_PER_ROW, tl.int64)
    column = tl.program_id(0) % TILES_PER_ROW * TILE + tl.arange(0, TILE)
    mask = column < HIDDEN_SIZE
    terms = ()
    for host in tl.static_range(NUM_HOSTS):
        row_ptr = terms_ptr + (host * num_rows + row) * HIDDEN_SIZE
        terms = terms + (tl.load(row_ptr + column, mask=mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    tl.store(out_ptr + row * HIDDEN_SIZE + column, _add(terms, NUM_HOSTS).to(tl.bfloat16), mask=mask)


@triton.jit
def _unless_failed(acc, segment_ptr, places):
    """The sum, or NaN if it goes to other hosts and this rank has failed."""
    if len(places) > 1:
        acc = tl.where(has_failed(segment_ptr), float("nan"), acc)
    return acc


@triton.jit
def _add(terms, NUM_TERMS: tl.constexpr):
    """In fp32, in order."""
    acc = terms[0].to(tl.float32)
    for term in tl.static_range(1, NUM_TERMS):
        acc += terms[term].to(tl.float32)
    return acc
