"""Dispatch and combine through peer memory, interpreted: the ranks of one process take turns.

Where there is a GPU, test/gpu/test_peer_memory.py runs them compiled, in a process a rank.
"""

from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peer_memory_cases as cases
from nibble.distributed import peer_memory
from nibble.distributed.communicator import PeerError, SingleRankCommunicator
from nibble.distributed.peer_memory import PeerMemory, PeerMemoryUnavailable, SegmentLayout
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack
from nibble.kernels.triton.peer_combine import peer_combine
from nibble.kernels.triton.peer_dispatch import peer_dispatch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")

INPUT_SCALE = torch.tensor(0.01)
SIZES = [[3], [2, 2], [1, 4, 2], [0, 3, 0, 1], [5, 0], [0, 0, 2, 1, 4, 1, 0, 3]]


@pytest.fixture(scope="module", autouse=True)
def interpretable() -> Iterator[None]:
    with cases.interpretable(), np.errstate(all="ignore"):
        yield


def dispatch_all(ranks: list[PeerMemory], sizes: list[int], layout: WireRowLayout, seed: int = 0) -> None:
    """Every rank dispatches; then each segment holds the wire rows of all."""
    rows = cases.rows_of(sizes, layout, seed)
    gathered = []
    for memory, own in zip(ranks, rows, strict=True):
        cases.let_everybody_arrive(memory)
        gathered.append(peer_dispatch(memory, *own, INPUT_SCALE, sizes))
    expected = torch.cat([quantize_pack(*own, INPUT_SCALE) for own in rows])
    for got in gathered:
        assert torch.equal(got, expected)


def combine_all(ranks: list[PeerMemory], sizes: list[int], seed: int = 0) -> None:
    """Every rank combines, and gets its rows of the sum."""
    partials = cases.partials_of(sizes, ranks[0].layout.hidden_size, seed)
    for memory, partial in zip(ranks, partials, strict=True):
        cases.store_partial(memory, partial)
    total = cases.sum_by_rank([cases.as_stored(ranks[0], partial) for partial in partials])
    expected = cases.cut_off(total).split(sizes)
    for memory, own in zip(ranks, expected, strict=True):
        cases.let_everybody_arrive(memory)
        assert torch.equal(peer_combine(memory, sizes), own)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_rank_gets_the_bytes_of_quantize_pack_of_all_ranks_and_its_rows_of_the_sum(sizes: list[int]) -> None:
    layout = WireRowLayout(96, 3)
    ranks = cases.ranks_of_one_process(len(sizes), SegmentLayout(sum(sizes), layout.row_bytes, 96))
    for seed in range(2):
        dispatch_all(ranks, sizes, layout, seed)
        combine_all(ranks, sizes, seed)


@pytest.mark.parametrize("sizes", [[3], [0, 3, 0, 1], [2, 2]], ids=str)
def test_results_in_fp8_rows_are_summed_as_the_numbers_that_they_are(sizes: list[int]) -> None:
    layout = WireRowLayout(304, 3)
    ranks = cases.ranks_of_one_process(len(sizes), SegmentLayout(sum(sizes), layout.row_bytes, 304, fp8_partial=True))
    dispatch_all(ranks, sizes, layout)
    combine_all(ranks, sizes)


def test_a_segment_of_fp8_results_is_smaller_by_the_bytes_that_they_save() -> None:
    rows, page = 4096, 2 << 20
    bf16, fp8 = SegmentLayout(rows, 4096, 7168), SegmentLayout(rows, 4096, 7168, fp8_partial=True)
    saved = rows * (2 * 7168 - 7392)
    assert saved - page < bf16.num_bytes - fp8.num_bytes < saved + page


@settings(max_examples=5, deadline=None)
@given(
    st.builds(WireRowLayout, st.integers(1, 12).map(lambda blocks: blocks * 16), st.integers(1, 9)),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
def test_any_shape_is_carried(layout: WireRowLayout, sizes: list[int]) -> None:
    ranks = cases.ranks_of_one_process(len(sizes), SegmentLayout(12, layout.row_bytes, layout.hidden_size))
    dispatch_all(ranks, sizes, layout)
    combine_all(ranks, sizes)


def test_a_rank_without_rows_takes_part_and_without_any_rows_nobody_does() -> None:
    layout = WireRowLayout(64, 2)
    ranks = cases.ranks_of_one_process(2, SegmentLayout(4, layout.row_bytes, 64))
    dispatch_all(ranks, [0, 4], layout)
    combine_all(ranks, [0, 4])
    assert [cases.rounds(memory) for memory in ranks] == [2, 2]
    dispatch_all(ranks, [0, 0], layout)
    combine_all(ranks, [0, 0])
    assert [cases.rounds(memory) for memory in ranks] == [2, 2]


def test_every_round_raises_the_flag_at_every_peer_once_and_nothing_is_reset() -> None:
    layout = WireRowLayout(64, 2)
    ranks = cases.ranks_of_one_process(3, SegmentLayout(6, layout.row_bytes, 64))
    for step in range(3):
        dispatch_all(ranks, [1, 2, 3], layout)
        assert cases.flags(ranks[0]).tolist() == [2 * step + 1] * 3
        combine_all(ranks, [1, 2, 3])
        assert cases.flags(ranks[0]).tolist() == [2 * step + 2] * 3


def test_a_peer_that_does_not_come_is_named_and_nobody_waits_for_it_again() -> None:
    layout, sizes = WireRowLayout(64, 2), [1, 2, 3]
    ranks = cases.ranks_of_one_process(3, SegmentLayout(6, layout.row_bytes, 64), timeout_s=1e-7)
    memory = ranks[1]
    rows = cases.rows_of(sizes, layout)[1]
    memory.raise_failure()
    cases.flags(memory)[0] = cases.ALWAYS
    peer_dispatch(memory, *rows, INPUT_SCALE, sizes)
    with pytest.raises(PeerError, match="rank 2 did not arrive within 1e-07 s"):
        memory.raise_failure()
    begin = next(cases.TICKS)
    peer_combine(memory, sizes)
    assert next(cases.TICKS) - begin < 20  # looks at the clock, where the first wait took a hundred


def test_all_ranks_hear_of_a_failure_and_the_rank_that_failed_leaves_their_memory_alone() -> None:
    layout, sizes = WireRowLayout(64, 2), [1, 2, 3]
    ranks = cases.ranks_of_one_process(3, SegmentLayout(6, layout.row_bytes, 64), timeout_s=1e-7)
    rows = cases.rows_of(sizes, layout)
    cases.flags(ranks[1])[0] = cases.ALWAYS
    peer_dispatch(ranks[1], *rows[1], INPUT_SCALE, sizes)
    told = [memory.segment.clone() for memory in (ranks[0], ranks[2])]
    for seed in range(2):
        peer_combine(ranks[1], sizes)
        peer_dispatch(ranks[1], *cases.rows_of(sizes, layout, seed + 1)[1], INPUT_SCALE, sizes)
    assert torch.equal(ranks[0].segment, told[0]) and torch.equal(ranks[2].segment, told[1])
    for memory in (ranks[0], ranks[2]):  # rank 2 comes late, when all others have come
        cases.flags(memory)[0] = cases.ALWAYS
        begin = next(cases.TICKS)
        peer_dispatch(memory, *rows[memory.rank], INPUT_SCALE, sizes)
        assert next(cases.TICKS) - begin < 20, "the others are still waited for"
        with pytest.raises(PeerError, match="rank 2 did not arrive within 1e-07 s"):
            memory.raise_failure()


@mock.patch("torch.cuda.synchronize", mock.Mock())
@mock.patch.object(type(peer_memory.meet_kernel), "warmup", mock.Mock())
def test_memory_is_tried_out_by_a_round_and_whatever_goes_wrong_is_why_it_is_not_available() -> None:
    group = SingleRankCommunicator("alone")
    memory = cases.ranks_of_one_process(1, SegmentLayout(6, 64, 64), timeout_s=60)[0]
    peer_memory._try_out(group, memory)
    assert cases.rounds(memory) == 1 and memory.timeout_s == 60
    late, _other = cases.ranks_of_one_process(2, SegmentLayout(6, 64, 64), timeout_s=1e-7)
    with (
        mock.patch.object(peer_memory, "_why_out_of_reach", return_value=""),  # the other rank has left no mark either
        pytest.raises(PeerMemoryUnavailable, match="rank 0: rank 1 did not arrive within 1e-07 s"),
    ):
        peer_memory._try_out(group, late)
    with (
        mock.patch.object(peer_memory, "read_marks_kernel", None),
        pytest.raises(PeerMemoryUnavailable, match="rank 0: TypeError: 'NoneType'"),
    ):
        peer_memory._try_out(group, memory)


def test_more_rows_than_the_memory_was_made_for_are_refused() -> None:
    memory = cases.ranks_of_one_process(1, SegmentLayout(6, 64, 64))[0]
    with pytest.raises(ValueError, match=r"7 rows of all ranks.*sized for 6"):
        memory.partial(7)
