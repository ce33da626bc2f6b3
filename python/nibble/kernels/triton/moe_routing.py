"""Sorting (row, expert) pairs by expert on the device: in one launch, or two where there are many.

A pair is the index ``row * top_k + slot`` into the ids. The pairs of this rank's experts are sorted by expert and then
by index, and cut into blocks of at most `BLOCK_M` pairs of one expert: int32 [max_blocks, BLOCK_M], of which nobody
writes what an expert does not fill. The experts of the blocks and their numbers of pairs are two rows of `max_blocks`
int32. So the number of a block leads to all there is to know of it, by loads that do not wait for each other.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import triton
import triton.language as tl

from nibble.kernels.triton.dependent_launch import let_successor_start, wait_for_predecessor

RANK_TILE = 128  # pairs that are compared with each other at once
COUNTED_TILES = 32  # of which the counts are looked at, at once


def choose_assign_tile(num_pairs: int) -> int:
    """How many pairs a program places. If that is all, `assign` does it, otherwise `count` and then `place_kernel`."""
    if num_pairs > 2 * COUNTED_TILES * RANK_TILE:
        return 2 * RANK_TILE  # in two rounds, but with half the counts to look at
    return min(RANK_TILE, max(32, triton.next_power_of_2(num_pairs)))


@triton.jit
def load_block(block, blocks_ptr, max_blocks):
    """The expert (int64) and number of pairs of a block below `max_blocks`; without meaning beyond the last one."""
    return tl.load(blocks_ptr + block).to(tl.int64), tl.load(blocks_ptr + max_blocks + block)


@triton.jit
def load_pairs(block, sorted_pairs_ptr, num_pairs, BLOCK_M: tl.constexpr, SIZE: tl.constexpr):
    """The first `SIZE` pairs of a block, 0 beyond its `num_pairs`; and where there are pairs."""
    index = tl.arange(0, SIZE)
    pair = tl.load(sorted_pairs_ptr + block * BLOCK_M + index)  # no mask: it would wait for `num_pairs`
    mask = index < num_pairs
    return tl.where(mask, pair, 0), mask


@triton.jit
def assign(
    ids_ptr,
    sorted_pairs_ptr,
    blocks_ptr,
    num_blocks_ptr,
    ids_stride,
    ids_slot_stride,
    num_pairs,
    first_expert,
    max_blocks,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    """Places all pairs, at most `TILE`, and lists the blocks."""
    pair = tl.arange(0, TILE)
    expert, is_local = _local_expert(
        pair, ids_ptr, ids_stride, ids_slot_stride, num_pairs, first_expert, TOP_K, NUM_EXPERTS
    )
    same, rank = _rank(pair, expert, is_local)
    is_first = is_local & (rank % BLOCK_M == 0)
    is_earlier = (expert[:, None] < expert[None, :]) & is_first[:, None]
    first_block = tl.sum(is_earlier.to(tl.int32), axis=0)  # of its expert
    place = first_block * BLOCK_M + rank
    block_ptr = blocks_ptr + place // BLOCK_M
    count = tl.sum(same.to(tl.int32), axis=0)
    tl.store(block_ptr, expert, mask=is_first)
    tl.store(block_ptr + max_blocks, tl.minimum(count - rank, BLOCK_M), mask=is_first)
    tl.store(num_blocks_ptr, tl.sum(is_first.to(tl.int32), axis=0))
    tl.store(sorted_pairs_ptr + place, pair, mask=is_local)


@triton.jit
def count(
    tile,
    ids_ptr,
    counts_ptr,
    ids_stride,
    ids_slot_stride,
    num_pairs,
    first_expert,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERT_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many pairs of a tile each expert has: a row of int32 [tiles, EXPERT_TILE]."""
    pair = tile * TILE + tl.arange(0, TILE)
    expert, is_local = _local_expert(
        pair, ids_ptr, ids_stride, ids_slot_stride, num_pairs, first_expert, TOP_K, NUM_EXPERTS
    )
    count_ptr = counts_ptr + tile * EXPERT_TILE + tl.arange(0, EXPERT_TILE)
    tl.store(count_ptr, tl.histogram(expert, EXPERT_TILE, mask=is_local))


@triton.jit(do_not_specialize=["num_pairs", "first_expert", "max_blocks"])
def place_kernel(
    ids_ptr,
    counts_ptr,
    sorted_pairs_ptr,
    blocks_ptr,
    num_blocks_ptr,
    ids_stride,
    ids_slot_stride,
    num_pairs,
    first_expert,
    max_blocks,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERT_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ASSIGN_TILE: tl.constexpr,
    RANK_TILE: tl.constexpr,
    COUNTED_TILES: tl.constexpr,
):
    """Places the pairs of a tile each program; the first one also lists the blocks. All tiles have been counted."""
    wait_for_predecessor()
    let_successor_start()
    tile = tl.program_id(0)
    num_tiles = tl.cdiv(num_pairs, ASSIGN_TILE)
    totals = tl.zeros([EXPERT_TILE], tl.int32)
    before = tl.zeros([EXPERT_TILE], tl.int32)  # of which in earlier tiles
    for start in range(0, num_tiles, COUNTED_TILES):
        counted = (start + tl.arange(0, COUNTED_TILES))[:, None]
        count_ptr = counts_ptr + counted * EXPERT_TILE + tl.arange(0, EXPERT_TILE)[None, :]
        counts = tl.load(count_ptr, mask=counted < num_tiles, other=0)
        totals += tl.sum(counts, axis=0)
        before += tl.sum(tl.where(counted < tile, counts, 0), axis=0)
    num_blocks = (totals + BLOCK_M - 1) // BLOCK_M
    first_block = tl.cumsum(num_blocks, axis=0) - num_blocks
    experts = tl.arange(0, EXPERT_TILE)
    next_place = first_block * BLOCK_M + before  # of each expert
    for start in range(0, ASSIGN_TILE, RANK_TILE):
        pair = tile * ASSIGN_TILE + start + tl.arange(0, RANK_TILE)
        expert, is_local = _local_expert(
            pair, ids_ptr, ids_stride, ids_slot_stride, num_pairs, first_expert, TOP_K, NUM_EXPERTS
        )
        _, rank = _rank(pair, expert, is_local)
        is_expert = (experts[:, None] == expert[None, :]) & is_local[None, :]
        place = rank + tl.sum(tl.where(is_expert, next_place[:, None], 0), axis=0)
        tl.store(sorted_pairs_ptr + place, pair, mask=is_local)
        next_place += tl.sum(is_expert.to(tl.int32), axis=1)
    if tile == 0:
        tl.store(num_blocks_ptr, tl.sum(num_blocks, axis=0))
        for index in range(0, tl.max(num_blocks, axis=0)):
            block_ptr = blocks_ptr + first_block + index
            mask = index < num_blocks
            tl.store(block_ptr, experts, mask=mask)
            tl.store(block_ptr + max_blocks, tl.minimum(totals - index * BLOCK_M, BLOCK_M), mask=mask)


@triton.jit
def _rank(pair, expert, is_local):
    """Which pairs of a tile have the same expert, [other pair, pair], and each pair's place among those of its expert.

    That way round little of a sum crosses threads.
    """
    same = (expert[:, None] == expert[None, :]) & is_local[:, None]
    return same, tl.sum((same & (pair[:, None] < pair[None, :])).to(tl.int32), axis=0)


@triton.jit
def _local_expert(
    pair,
    ids_ptr,
    ids_stride,
    ids_slot_stride,
    num_pairs,
    first_expert,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
):
    """The local index of each pair's expert, and whether it is on this rank."""
    row = pair // TOP_K
    id_ptr = ids_ptr + row * ids_stride + (pair - row * TOP_K) * ids_slot_stride
    expert = tl.load(id_ptr, mask=pair < num_pairs, other=-1)
    is_local = (expert >= first_expert) & (expert < first_expert + NUM_EXPERTS)
    return tl.where(is_local, expert - first_expert, 0), is_local
