"""What a MoE layer sends through peer memory and what through collectives; ranks of one process take turns.

Where there is a GPU, the tests of whole models in test/gpu run both.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import fp8_row_cases
import peer_memory_cases as cases
from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import SingleRankCommunicator
from nibble.distributed.parallel_state import ParallelState
from nibble.distributed.peer_memory import PeerMemory, SegmentLayout
from nibble.kernels.torch.fp8_row import leave_result, quantize_fp8_rows
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.layers.moe.combiner import make_combiner
from nibble.layers.moe.peer_dispatcher import PeerCombineDispatcher, PeerCombiner, PeerMemoryDispatcher

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")

LAYOUT = WireRowLayout(64, 2)
SIZES = [3, 0, 2]
INPUT_SCALE = torch.tensor(0.01)
CONFIG = {
    combine: cast(
        EngineConfig,
        SimpleNamespace(
            args=SimpleNamespace(moe_combine_dtype=combine),
            model=SimpleNamespace(hidden_size=64),
            dtype="bfloat16",
            kernels="torch",
            moe_kernel="torch",
        ),
    )
    for combine in ("bf16", "fp8")
}
"""By --moe-combine-dtype."""
COMBINE = pytest.mark.parametrize("combine", list(CONFIG))


class Collectives(SingleRankCommunicator):
    """One rank's group; what it would get from the others is known, what it enters is noted."""

    def __init__(self, rank: int, rows: list[tuple[Tensor, ...]], partials: list[Tensor]) -> None:
        super().__init__("tp")
        self.rank, self.world_size = rank, len(SIZES)
        self.rows, self.partials = rows, partials
        self.entered: list[str] = []

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        self.entered.append("gather")
        if len(tensors) == 1:
            return [torch.cat([quantize_pack(*own, INPUT_SCALE) for own in self.rows])]
        return [torch.cat(column) for column in zip(*self.rows, strict=True)]

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self.entered.append("reduce_scatter")
        return cases.sum_by_rank(self.partials).bfloat16().split(sizes)[self.rank]

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self.entered.append("all_to_all")
        sent = [quantize_fp8_rows(partial) for partial in self.partials]
        fp8_row_cases.assert_same_rows(x, sent[self.rank], 64)
        return torch.cat([rows.split(sizes)[self.rank] for rows in sent])


class Ranks:
    """Every rank's half of one layer without its experts, whose results are given."""

    def __init__(self, max_rows: int, fp4: bool, combine: str = "bf16") -> None:
        segment = SegmentLayout(max_rows, LAYOUT.row_bytes, 64, fp8_partial=combine == "fp8")
        self.memories = cases.ranks_of_one_process(len(SIZES), segment)
        self.rows = cases.rows_of(SIZES, LAYOUT)
        self.partials = cases.partials_of(SIZES, 64)
        self.groups = [Collectives(rank, self.rows, self.partials) for rank in range(len(SIZES))]
        self.dispatchers = [self._dispatcher(memory, fp4, CONFIG[combine]) for memory in self.memories]

    def _dispatcher(
        self, memory: PeerMemory, fp4: bool, config: EngineConfig
    ) -> PeerMemoryDispatcher | PeerCombineDispatcher:
        combiner = PeerCombiner(memory, make_combiner(config))
        if not fp4:
            return PeerCombineDispatcher(combiner)
        dispatcher = PeerMemoryDispatcher(config, LAYOUT.top_k, combiner)
        dispatcher.input_scale = INPUT_SCALE
        return dispatcher

    def dispatch(self) -> list[Any]:
        return [self._in_step(rank, lambda d, r=rank: d.dispatch(*self.rows[r])) for rank in range(len(SIZES))]

    def combine(self, gathered: list[Any], elsewhere: bool = False) -> Tensor:
        """The experts leave their results where they are told, or `elsewhere`."""
        partials = []
        for memory, rows, partial in zip(self.memories, gathered, self.partials, strict=True):
            if memory.fits(sum(SIZES)):
                cases.store_partial(memory, partial)  # by now all have, whose turn to combine comes later
            partials.append(partial if elsewhere or rows.out is None else leave_result(partial, rows.out))
        return torch.cat([self._in_step(r, lambda d, p=p: d.combine(p)) for r, p in enumerate(partials)])

    def total(self) -> Tensor:
        """The sums, not rounded."""
        return cases.sum_by_rank([cases.as_stored(self.memories[0], partial) for partial in self.partials])

    def _in_step(self, rank: int, call: Any) -> Any:
        cases.let_everybody_arrive(self.memories[rank])
        group, alone = self.groups[rank], SingleRankCommunicator("alone")
        parallel = ParallelState(rank, group, alone, alone, group, group, ep_size=len(SIZES))
        with dp_step(DpStep(parallel, tuple(SIZES), tuple(SIZES))):
            return call(self.dispatchers[rank])

    @property
    def entered(self) -> list[list[str]]:
        return [group.entered for group in self.groups]


@pytest.fixture(scope="module", autouse=True)
def interpretable() -> Iterator[None]:
    with cases.interpretable(), np.errstate(all="ignore"):
        yield


def test_with_fp4_rows_and_results_go_through_the_memory_and_no_collective_is_entered() -> None:
    ranks = Ranks(max_rows=5, fp4=True)
    gathered = ranks.dispatch()
    expected = torch.cat([rows[0] for rows in ranks.rows])
    for memory, rows in zip(ranks.memories, gathered, strict=True):
        assert rows.x_fp4.shape == (5, 32)
        assert torch.equal(rows.topk_ids, torch.cat([own[1] for own in ranks.rows]))
        assert rows.out.data_ptr() == memory.partial(5).data_ptr()
    assert ranks.combine(gathered).shape == expected.shape
    assert ranks.entered == [[], [], []]


@COMBINE
def test_without_fp4_rows_are_gathered_as_they_are_and_the_sums_are_the_same_bits(combine: str) -> None:
    on, off = Ranks(max_rows=5, fp4=True, combine=combine), Ranks(max_rows=5, fp4=False, combine=combine)
    sums_on, gathered = on.combine(on.dispatch()), off.dispatch()
    assert torch.equal(gathered[0].x, torch.cat([rows[0] for rows in off.rows]))
    assert torch.equal(off.combine(gathered), sums_on)
    assert off.entered == [["gather"], ["gather"], ["gather"]]


@COMBINE
def test_results_that_the_experts_left_elsewhere_are_brought_to_where_peers_read_them(combine: str) -> None:
    told, elsewhere = Ranks(max_rows=5, fp4=False, combine=combine), Ranks(max_rows=5, fp4=False, combine=combine)
    sums = told.combine(told.dispatch())
    assert torch.equal(elsewhere.combine(elsewhere.dispatch(), elsewhere=True), sums)
    torch.testing.assert_close(sums.float(), told.total(), rtol=2**-7, atol=0)


@COMBINE
@pytest.mark.parametrize("fp4", [True, False])
def test_a_step_with_more_rows_than_the_memory_holds_takes_the_collectives_both_ways(fp4: bool, combine: str) -> None:
    ranks = Ranks(max_rows=4, fp4=fp4, combine=combine)
    sums = ranks.combine(ranks.dispatch())
    assert torch.equal(sums, ranks.total().bfloat16())
    assert ranks.entered == [["gather", "all_to_all" if combine == "fp8" else "reduce_scatter"]] * 3
    assert cases.rounds(ranks.memories[0]) == 0
