"""Peer memory inside each of several hosts, interpreted: the ranks of all hosts take turns in one process.

What travels between hosts is known beforehand. test/gpu/test_peer_hosts.py has processes and NCCL.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peer_memory_cases as cases
from nibble.distributed.communicator import Communicator, PeerError, SingleRankCommunicator
from nibble.distributed.parallel_state import ParallelState
from nibble.distributed.peer_memory import PeerMemory, SegmentLayout
from nibble.kernels.torch.fp8_row import leave_result
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack
from nibble.kernels.triton.peer_combine import peer_combine, sum_over_hosts
from nibble.kernels.triton.peer_dispatch import peer_store
from nibble.kernels.triton.rail import rail_places, rail_sizes
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.layers.moe.combiner import make_combiner
from nibble.layers.moe.peer_dispatcher import PeerCombineDispatcher, PeerCombiner, PeerMemoryDispatcher
from peer_memory_cases import cut_off
from test_peer_dispatcher import COMBINE, CONFIG

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")

LAYOUT = WireRowLayout(64, 2)
INPUT_SCALE = torch.tensor(0.01)
HOSTS_AND_SIZES = [
    (2, [1, 1, 1, 1]),
    (2, [0, 2, 0, 1]),  # a rail without rows
    (2, [0, 0, 3, 1]),  # a host without rows
    (3, [1, 0, 3, 2, 0, 1]),
]
"""Rows of every rank, host by host."""
HOSTS = pytest.mark.parametrize(("num_hosts", "sizes"), HOSTS_AND_SIZES)


@pytest.fixture(scope="module", autouse=True)
def interpretable() -> Iterator[None]:
    with cases.interpretable(), np.errstate(all="ignore"):
        yield


def memories_of(num_hosts: int, sizes: list[int], fp8_partial: bool = False, max_rows: int = 32) -> list[PeerMemory]:
    layout = SegmentLayout(max_rows, LAYOUT.row_bytes, LAYOUT.hidden_size, fp8_partial)
    size = len(sizes) // num_hosts
    hosts = [cases.ranks_of_one_process(size, layout, first_rank=host * size) for host in range(num_hosts)]
    return [memory for host in hosts for memory in host]


def rail_of(memory: PeerMemory, of_ranks: list[Tensor]) -> list[Tensor]:
    return of_ranks[memory.rank :: memory.world_size]


def sums_of_hosts(memory: PeerMemory, partials: list[Tensor]) -> list[Tensor]:
    """By host: what its ranks have of all rows, added in fp32 and rounded."""
    stored = [cases.as_stored(memory, partial) for partial in partials]
    size = memory.world_size
    return [cut_off(cases.sum_by_rank(stored[first : first + size])) for first in range(0, len(stored), size)]


class Rail(SingleRankCommunicator):
    """One rank's rail; what it brings is checked, and what it would get from the other hosts is known."""

    def __init__(self, memory: PeerMemory, wire_rows: list[Tensor], sums: list[Tensor], sizes: list[int]) -> None:
        super().__init__("rail")
        self.rank, self.world_size = memory.first_rank // memory.world_size, len(sums)
        self.wire_rows = rail_of(memory, wire_rows)
        places = [rail_of(memory, list(of_host.split(sizes))) for of_host in sums]
        self.brought, self.sums = torch.cat(places[self.rank]), [of_rail[self.rank] for of_rail in places]
        self.entered: list[str] = []

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        self.entered.append("gather")
        assert torch.equal(tensors[0], self.wire_rows[self.rank])
        return [torch.cat(self.wire_rows)]

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self.entered.append("all_to_all")
        assert torch.equal(x, self.brought)
        return torch.cat(self.sums)


class Layer:
    """Every rank's half of one layer without its experts, whose results are given."""

    def __init__(self, num_hosts: int, sizes: list[int], fp4: bool = True, combine: str = "bf16", **memory: Any):
        self.sizes = sizes
        self.memories = memories_of(num_hosts, sizes, combine == "fp8", **memory)
        self.rows = cases.rows_of(sizes, LAYOUT)
        self.wire_rows = [quantize_pack(*own, INPUT_SCALE) for own in self.rows]
        self.partials = cases.partials_of(sizes, LAYOUT.hidden_size)
        self.sums = sums_of_hosts(self.memories[0], self.partials)
        self.rails = [Rail(memory, self.wire_rows, self.sums, sizes) for memory in self.memories]
        self.all_ranks = AllRanks(self)
        self.dispatchers = []
        for memory, rail in zip(self.memories, self.rails, strict=True):
            combiner = PeerCombiner(memory, make_combiner(CONFIG[combine]), rail)
            if fp4:
                dispatcher: Any = PeerMemoryDispatcher(CONFIG[combine], LAYOUT.top_k, combiner)
                dispatcher.input_scale = INPUT_SCALE
            else:
                dispatcher = PeerCombineDispatcher(combiner)
            self.dispatchers.append(dispatcher)

    def dispatch(self) -> list[Any]:
        return [self.in_step(rank, lambda d, own=own: d.dispatch(*own)) for rank, own in enumerate(self.rows)]

    def combine(self, gathered: list[Any]) -> Tensor:
        for memory, partial in zip(self.memories, self.partials, strict=True):
            if memory.fits(len(partial)):
                cases.store_partial(memory, partial)  # by now all have, whose turn to combine comes later
        results = []
        for rank, (rows, partial) in enumerate(zip(gathered, self.partials, strict=True)):
            left = partial if rows.out is None else leave_result(partial, rows.out)
            results.append(self.in_step(rank, lambda d, left=left: d.combine(left)))
        return torch.cat(results)

    def in_step(self, rank: int, call: Any) -> Any:
        cases.let_everybody_arrive(self.memories[rank])
        self.all_ranks.rank = rank
        alone: Communicator = SingleRankCommunicator("alone")
        parallel = ParallelState(rank, self.all_ranks, alone, alone, self.all_ranks, alone, ep_size=len(self.sizes))
        with dp_step(DpStep(parallel, tuple(self.sizes), tuple(self.sizes))):
            return call(self.dispatchers[rank])


class AllRanks(SingleRankCommunicator):
    """The group of all hosts, in the place of one rank after the other."""

    def __init__(self, layer: Layer) -> None:
        super().__init__("tp")
        self.world_size, self.layer = len(layer.sizes), layer
        self.entered: list[str] = []

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        self.entered.append("gather")
        if len(tensors) == 1:
            return [torch.cat(self.layer.wire_rows)]
        return [torch.cat(column) for column in zip(*self.layer.rows, strict=True)]

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self.entered.append("reduce_scatter")
        return cases.sum_by_rank(self.layer.partials).bfloat16().split(sizes)[self.rank]


@HOSTS
def test_places_of_a_rails_rows_are_those_of_its_ranks_among_all(num_hosts: int, sizes: list[int]) -> None:
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for rank, memory in enumerate(memories_of(num_hosts, sizes)):
        rail = range(rank % memory.world_size, len(sizes), memory.world_size)
        expected = [starts[r] + row for r in rail for row in range(sizes[r])]
        assert len(expected) == sum(rail_sizes(memory, sizes))
        behind, *further = ((number - 3) // 2 for number in rail_places(memory, sizes))
        begins, shifts = further[::2], [behind, *further[1::2]]
        hosts = [sum(row >= begin for begin in begins) for row in range(len(expected))]
        assert [row + shifts[host] for row, host in enumerate(hosts)] == expected


def test_no_number_of_rows_makes_triton_compile_again() -> None:
    """As 1 and multiples of 16 would, in the midst of serving."""
    memory = memories_of(2, [0, 0, 0, 0])[0]
    for rows in range(40):
        assert all(number > 1 and number % 2 for number in rail_places(memory, [rows, 1, rows, 16 - rows % 16]))


@HOSTS
def test_stored_rows_of_all_rails_are_the_bytes_of_quantize_pack_in_rank_order(
    num_hosts: int, sizes: list[int]
) -> None:
    memories = memories_of(num_hosts, sizes)
    for seed in range(2):
        wire_rows = [quantize_pack(*own, INPUT_SCALE) for own in cases.rows_of(sizes, LAYOUT, seed)]
        gathered = []
        for memory in memories:
            cases.let_everybody_arrive(memory)
            gathered.append(peer_store(memory, torch.cat(rail_of(memory, wire_rows)), sizes))
        for got in gathered:
            assert torch.equal(got, torch.cat(wire_rows))
        assert {cases.rounds(memory) for memory in memories} == {seed + 1}


@pytest.mark.parametrize(("num_hosts", "sizes", "combine"), [(*HOSTS_AND_SIZES[3], "bf16"), (2, [0, 2, 0, 1], "fp8")])
def test_a_hosts_sums_are_those_of_its_rails_rows_and_the_sum_over_hosts_is_near_the_truth(
    num_hosts: int, sizes: list[int], combine: str
) -> None:
    memories = memories_of(num_hosts, sizes, combine == "fp8")
    partials = cases.partials_of(sizes, LAYOUT.hidden_size)
    for memory, partial in zip(memories, partials, strict=True):
        cases.store_partial(memory, partial)
    expected = sums_of_hosts(memories[0], partials)
    brought: dict[int, list[Tensor]] = {rank: [] for rank in range(len(sizes))}  # to each rank, by host
    for memory in memories:
        cases.let_everybody_arrive(memory)
        of_host = expected[memory.first_rank // memory.world_size].split(sizes)
        sums = peer_combine(memory, sizes)
        assert torch.equal(sums, torch.cat(rail_of(memory, list(of_host))))
        for owner, rows in zip(
            range(memory.rank, len(sizes), memory.world_size), sums.split(rail_sizes(memory, sizes)), strict=True
        ):
            brought[owner].append(rows)
    totals = torch.cat([sum_over_hosts(torch.cat(terms), num_hosts) for terms in brought.values()])
    assert torch.equal(totals, cut_off(cases.sum_by_rank(expected)))
    stored = torch.stack([cases.as_stored(memories[0], partial) for partial in partials]).double()
    # Each host's sum and the whole one are cut off to 8 bits.
    bound = 2**-7 * (torch.stack(expected).double().abs().sum(0) + stored.sum(0).abs()) + 1e-6
    assert ((totals.double() - stored.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize(("num_hosts", "sizes"), HOSTS_AND_SIZES[:2])
@COMBINE
def test_rows_and_sums_take_the_rail_and_the_memory_and_no_collective_of_all_hosts(
    num_hosts: int, sizes: list[int], combine: str
) -> None:
    layer = Layer(num_hosts, sizes, combine=combine)
    gathered = layer.dispatch()
    for memory, rows in zip(layer.memories, gathered, strict=True):
        assert torch.equal(rows.topk_ids, torch.cat([own[1] for own in layer.rows]))
        assert rows.out.data_ptr() == memory.partial(sum(sizes)).data_ptr()
    assert torch.equal(layer.combine(gathered), cut_off(cases.sum_by_rank(layer.sums)))
    assert layer.all_ranks.entered == []
    for memory, rail in zip(layer.memories, layer.rails, strict=True):
        assert rail.entered == (["gather", "all_to_all"] if any(rail_sizes(memory, sizes)) else [])


def test_without_fp4_rows_are_gathered_as_they_are_by_all_hosts_and_the_sums_are_the_same_bits() -> None:
    sizes = [2, 1, 0, 3]
    on, off = Layer(2, sizes, fp4=True), Layer(2, sizes, fp4=False)
    sums, gathered = on.combine(on.dispatch()), off.dispatch()
    assert torch.equal(gathered[0].x, torch.cat([rows[0] for rows in off.rows]))
    assert torch.equal(off.combine(gathered), sums)
    assert off.all_ranks.entered == ["gather"] * 4
    assert [rail.entered for rail in off.rails] == [["all_to_all"]] * 4


@pytest.mark.parametrize("fp4", [True, False])
def test_a_step_with_more_rows_than_the_memory_holds_takes_the_collectives_of_all_hosts_both_ways(fp4: bool) -> None:
    layer = Layer(2, [2, 1, 0, 3], fp4=fp4, max_rows=5)
    sums = layer.combine(layer.dispatch())
    assert torch.equal(sums, cases.sum_by_rank(layer.partials).bfloat16())
    assert layer.all_ranks.entered == ["gather"] * 4 + ["reduce_scatter"] * 4
    assert [rail.entered for rail in layer.rails] == [[]] * 4
    assert cases.rounds(layer.memories[0]) == 0


def test_without_rows_on_any_host_nothing_is_entered() -> None:
    layer = Layer(2, [0, 0, 0, 0])
    assert layer.combine(layer.dispatch()).shape == (0, LAYOUT.hidden_size)
    assert all(rail.entered == [] for rail in layer.rails) and cases.rounds(layer.memories[0]) == 0


@COMBINE
def test_a_missing_rank_is_named_by_its_number_among_all_and_no_sum_of_garbage_goes_to_other_hosts(
    combine: str,
) -> None:
    layout = SegmentLayout(8, LAYOUT.row_bytes, LAYOUT.hidden_size, combine == "fp8")
    memory, _ = cases.ranks_of_one_process(2, layout, timeout_s=1e-7, first_rank=2)
    sizes = [1, 1, 2, 1]
    cases.store_partial(memory, cases.partials_of(sizes, LAYOUT.hidden_size)[2])
    sums = peer_combine(memory, sizes)
    assert sums.shape == (3, LAYOUT.hidden_size) and sums.isnan().all()
    with pytest.raises(PeerError, match="rank 3 did not arrive"):
        memory.raise_failure()
