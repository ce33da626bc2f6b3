"""Where the rows of a rail lie: of the ranks that have the same place on each of several hosts, one after the other.

Ranks are numbered host by host. On one host a rail is one rank.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from collections.abc import Sequence

import triton
import triton.language as tl

from nibble.distributed.peer_memory import PeerMemory


def rail_sizes(memory: PeerMemory, sizes: Sequence[int]) -> tuple[int, ...]:
    """Of the rows of all ranks, `sizes`, those of this rank's rail: one number a host."""
    return tuple(sizes[memory.rank :: memory.world_size])


def rail_places(memory: PeerMemory, sizes: Sequence[int]) -> tuple[int, ...]:
    """What `place_of` takes: how far behind their number in the rail the first host's rows lie; then for each further
    host the number of its first row in the rail, and how far behind that its rows lie.

    Triton compiles a kernel anew where a number in a tuple becomes 1 or a multiple of 16, so all are made odd.
    """
    numbers, row_of_rail = [], 0
    for rank in range(memory.rank, len(sizes), memory.world_size):
        numbers += [row_of_rail, sum(sizes[:rank]) - row_of_rail]
        row_of_rail += sizes[rank]
    return tuple(2 * number + 3 for number in numbers[1:])


@triton.jit
def place_of(row, places):
    """The place of a row of the rail among those of all ranks, int64."""
    behind = places[0]
    for host in tl.static_range(1, (len(places) + 1) // 2):
        behind = tl.where(2 * row + 3 >= places[2 * host - 1], places[2 * host], behind)
    return tl.cast(row, tl.int64) + (behind >> 1) - 1
