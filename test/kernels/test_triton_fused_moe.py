"""The Triton twin of the NVFP4 experts, interpreted.

Where there is a GPU, test/gpu/test_fused_moe_gpu.py runs it compiled instead.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_moe_cases as cases
from nibble.kernels.torch.wire_row import WireRowLayout, unpack
from nibble.kernels.triton import fused_moe, moe_prepare
from nibble.kernels.triton.fused_moe import Nvfp4MoE
from nibble.kernels.triton.nvfp4_tiles import Tiling
from wire_row_cases import poisoned_allocations

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 6, 80, 48, 3
PACKED = cases.random_experts(0, EXPERTS, HIDDEN, INTERMEDIATE)


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> Iterator[None]:
    with np.errstate(all="ignore"), poisoned_allocations():
        yield


def run(batch: cases.Batch, first_expert: int = 0) -> torch.Tensor:
    return Nvfp4MoE(PACKED, first_expert, dtype=torch.float32)(*batch.arguments)


def batch_of(seed: int, rows: int, hidden: int = HIDDEN) -> cases.Batch:
    """Among the ids are those of this rank, -1 and two of other ranks."""
    return cases.random_batch(seed, rows, hidden, TOP_K, -1, EXPERTS + 2)


class TestAgreement:
    @settings(max_examples=8, deadline=None)
    @given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**16))
    def test_any_routing_gives_what_torch_gives(self, rows: int, top_k: int, first_expert: int, seed: int) -> None:
        batch = cases.random_batch(seed, rows, HIDDEN, top_k, -1, EXPERTS + 5)
        cases.assert_like_torch(PACKED, batch, first_expert)

    @pytest.mark.parametrize(
        ("experts", "hidden", "intermediate", "top_k"),
        [(1, 16, 16, 1), (3, 128, 128, 2), (2, 272, 400, 2), (70, 48, 16, 8)],
    )
    def test_any_shape_gives_what_torch_gives(self, experts: int, hidden: int, intermediate: int, top_k: int) -> None:
        packed = cases.random_experts(1, experts, hidden, intermediate)
        cases.assert_like_torch(packed, cases.random_batch(1, 10, hidden, top_k, 0, experts))

    @pytest.mark.parametrize("tiling", cases.TILINGS, ids=str)
    def test_every_tiling_gives_what_torch_gives(self, tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
        cases.use_tiling(monkeypatch, tiling)
        packed = cases.random_experts(2, 3, 640, 128)
        rows = min(tiling.block_m + 6, 70)
        batch = cases.random_batch(2, rows, 640, 2, 0, 4)
        batch.topk_ids[:-4, 0] = 1  # more pairs than most blocks hold
        cases.assert_like_torch(packed, batch)

    def test_few_pairs_with_wide_rows_are_cut_by_columns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a rank with few of the experts, where they would not keep a GPU busy otherwise."""
        splits = cases.record_splits(monkeypatch)
        packed = cases.random_experts(4, 2, 2304, 16)
        batch = cases.random_batch(4, 3, 2304, 2, -1, 4)
        cases.assert_like_torch(packed, batch, num_experts=64)
        assert splits == [2]

    def test_sums_of_cut_columns_take_little_memory(self) -> None:
        """There is room for the pairs of all ranks in them, so columns are not cut however few experts are here."""
        moe = Nvfp4MoE(cases.random_experts(4, 2, 2304, 16), 0, num_experts=64)
        assert [moe.choose_cut(pairs)[2] for pairs in (64, 65, 640)] == [2, 1, 1]

    def test_it_is_the_product_of_the_dequantized_tensors(self) -> None:
        batch = batch_of(3, 12)
        cases.assert_close(run(batch), cases.float64_reference(PACKED, batch, 0))

    def test_the_result_is_left_where_told(self) -> None:
        cases.assert_leaves_result_where_told(Nvfp4MoE(PACKED, 0), batch_of(4, 5), HIDDEN)
        cases.assert_leaves_fp8_rows_where_told(Nvfp4MoE(PACKED, 0), batch_of(4, 5), HIDDEN)

    def test_bf16_is_the_default_and_rounds_the_result_of_each_pair(self) -> None:
        batch = batch_of(4, 12)
        out = Nvfp4MoE(PACKED, 0)(*batch.arguments)
        assert out.dtype == torch.bfloat16
        cases.assert_close(out, cases.float64_reference(PACKED, batch, 0))

    def test_ranks_add_up_to_the_whole(self) -> None:
        batch = cases.random_batch(5, 20, HIDDEN, TOP_K, 0, EXPERTS)
        parts = [
            Nvfp4MoE(cases.slice_experts(PACKED, start, start + 2), start, dtype=torch.float32)(*batch.arguments)
            for start in range(0, EXPERTS, 2)
        ]
        torch.testing.assert_close(torch.stack(parts).sum(0), run(batch), rtol=1e-5, atol=1e-6)


class TestRouting:
    def test_a_row_without_an_expert_here_gives_exact_zeros_even_when_it_holds_nan(self) -> None:
        batch = batch_of(6, 4)
        batch.topk_ids.copy_(torch.tensor([[-1, -1, -1], [EXPERTS, 99, -1], [-1, 7, 9], [0, 0, 0]]))
        batch.x_scale.view(torch.uint8)[0] = 0x7F
        assert torch.equal(run(batch)[:3], torch.zeros(3, HIDDEN))
        assert run(batch)[3].all()

    def test_no_row_has_an_expert_here(self) -> None:
        batch = batch_of(7, 20)
        assert not run(replace(batch, topk_ids=torch.full_like(batch.topk_ids, -1))).any()

    @pytest.mark.parametrize(("counted_tiles", "rank_tile"), [(4, 16), (16, 16), (16, 8)])
    def test_more_pairs_than_one_program_places(
        self, monkeypatch: pytest.MonkeyPatch, counted_tiles: int, rank_tile: int
    ) -> None:
        """One kernel counts and another places. It looks at what was counted, and places, in several rounds or one."""
        monkeypatch.setattr(moe_prepare, "choose_assign_tile", lambda num_pairs: 16)
        monkeypatch.setattr(moe_prepare, "RANK_TILE", rank_tile)
        monkeypatch.setattr(moe_prepare, "COUNTED_TILES", counted_tiles)
        cases.assert_like_torch(PACKED, batch_of(8, 61))
        cases.assert_like_torch(PACKED, batch_of(8, 61), first_expert=2)

    def test_rows_of_several_passes_are_the_rows_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Although the only row of the last pass, alone, would be cut by columns."""
        monkeypatch.setattr(fused_moe, "_SPLIT_COLUMNS", 128)
        moe = Nvfp4MoE(cases.random_experts(9, EXPERTS, 272, INTERMEDIATE), 0, 10 * TOP_K, torch.float32)
        assert [moe.choose_cut(pairs)[2] for pairs in (10 * TOP_K, TOP_K)] == [1, 3]
        splits = cases.record_splits(monkeypatch)
        batch = batch_of(9, 10, 272)
        whole = moe(*batch.arguments)
        monkeypatch.setattr(fused_moe, "_MAX_ROWS", 3)
        assert torch.equal(moe(*batch.arguments), whole)
        assert not splits

    def test_an_expert_twice_in_a_row_counts_twice(self) -> None:
        batch = batch_of(10, 5)
        batch.topk_ids[:] = torch.tensor([2, 2, -1])
        once = replace(batch, topk_ids=batch.topk_ids[:, :1], topk_weights=batch.topk_weights[:, :2].sum(1, True))
        torch.testing.assert_close(run(batch), run(once), rtol=1e-5, atol=1e-6)


class TestIndependence:
    @pytest.fixture(params=["columns whole", "columns cut"])
    def moe(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Nvfp4MoE:
        if request.param == "columns whole":
            return Nvfp4MoE(PACKED, 0, dtype=torch.float32)
        monkeypatch.setattr(fused_moe, "_SPLIT_COLUMNS", 128)
        monkeypatch.setattr(fused_moe, "num_multiprocessors", lambda device: 132)
        moe = Nvfp4MoE(cases.random_experts(0, EXPERTS, 272, INTERMEDIATE), 0, 10 * TOP_K, torch.float32)
        assert moe.choose_cut(10 * TOP_K)[2] == 3
        return moe

    def test_the_order_of_rows_does_not_matter(self, moe: Nvfp4MoE) -> None:
        batch, order = batch_of(11, 10, moe.hidden_size), torch.randperm(10)
        shuffled = cases.Batch(*(tensor[order] for tensor in batch.arguments))
        assert torch.equal(moe(*shuffled.arguments), moe(*batch.arguments)[order])

    def test_the_order_of_a_rows_slots_does_not_matter(self, moe: Nvfp4MoE) -> None:
        batch, slots = batch_of(12, 10, moe.hidden_size), torch.tensor([2, 0, 1])
        shuffled = replace(batch, topk_ids=batch.topk_ids[:, slots], topk_weights=batch.topk_weights[:, slots])
        assert torch.equal(moe(*shuffled.arguments), moe(*batch.arguments))

    def test_the_same_inputs_give_the_same_bits(self, moe: Nvfp4MoE) -> None:
        batch = batch_of(13, 10, moe.hidden_size)
        assert torch.equal(moe(*batch.arguments), moe(*batch.arguments))

    def test_a_nan_poisons_its_own_row_only(self, moe: Nvfp4MoE) -> None:
        batch = batch_of(14, 10, moe.hidden_size)
        batch.topk_ids[4] = torch.tensor([1, 0, 2])
        clean = moe(*batch.arguments)
        batch.x_scale.view(torch.uint8)[4, 2] = 0x7F
        out = moe(*batch.arguments)
        assert out[4].isnan().all()
        others = torch.arange(10) != 4
        assert torch.equal(out[others], clean[others])


class TestViews:
    def test_the_fields_of_wire_rows_go_in_as_they_are(self) -> None:
        batch, layout = batch_of(15, 9), WireRowLayout(HIDDEN, TOP_K)
        fields = unpack(torch.zeros(9, layout.row_bytes, dtype=torch.uint8), layout)
        views = cases.Batch(fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights)
        for view, tensor in zip(views.arguments, batch.arguments, strict=True):
            view.copy_(tensor)
        assert torch.equal(run(views), run(batch))

    def test_values_that_are_not_aligned_to_words_are_copied(self) -> None:
        batch = batch_of(16, 5)
        shifted = torch.zeros(5 * HIDDEN // 2 + 1, dtype=torch.uint8)[1:].view(5, -1).copy_(batch.x_fp4)
        assert shifted.data_ptr() % 4
        assert torch.equal(run(replace(batch, x_fp4=shifted)), run(batch))


def test_zero_rows_launch_nothing_and_keep_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = Nvfp4MoE(PACKED, 0)
    for kernel in ("prepare", "_gate_up_kernel", "_down_kernel", "add_results"):
        monkeypatch.setattr(fused_moe, kernel, None)
    out = moe(*(tensor[:0] for tensor in batch_of(17, 1).arguments))
    assert (out.shape, out.dtype) == ((0, HIDDEN), torch.bfloat16)
