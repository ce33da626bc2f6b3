"""The Triton twin of the NVFP4 experts, compiled, agrees with the torch twin."""

from collections.abc import Iterator

import pytest
import torch

import fused_moe_cases as cases
from graph_cases import assert_replays_what_inputs_hold
from nibble.kernels.torch.wire_row import WireRowLayout, unpack
from nibble.kernels.triton import fused_moe
from nibble.kernels.triton.fused_moe import Nvfp4MoE
from nibble.kernels.triton.nvfp4_tiles import Tiling
from wire_row_cases import poisoned_allocations

pytestmark = pytest.mark.gpu

EXPERTS, INTERMEDIATE, TOP_K = 6, 400, 3


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poisoned_allocations():
        yield


@pytest.fixture(scope="module", params=[(528, EXPERTS), (2304, 500)], ids=["columns whole", "columns cut"])
def moe(request: pytest.FixtureRequest) -> Nvfp4MoE:
    """Experts of narrow rows, and of wide ones with so many experts elsewhere that few of them are cut by columns."""
    hidden, num_experts = request.param
    packed = cases.random_experts(0, EXPERTS, hidden, INTERMEDIATE)
    return Nvfp4MoE(cases.experts_to(packed, "cuda"), 0, num_experts, dtype=torch.float32)


def batch_of(moe: Nvfp4MoE, seed: int, rows: int) -> cases.Batch:
    """Among the ids are those of this rank, -1 and two of other ranks."""
    return cases.random_batch(seed, rows, moe.hidden_size, TOP_K, -1, EXPERTS + 2).to("cuda")


class TestExperts:
    @pytest.mark.parametrize(("rows", "first_expert"), [(1, 0), (7, 2), (64, 0), (300, 2), (1500, 0), (3000, 1)])
    def test_any_number_of_rows_gives_what_torch_gives(self, rows: int, first_expert: int) -> None:
        packed = cases.random_experts(rows, EXPERTS, 528, INTERMEDIATE)
        batch = cases.random_batch(rows, rows, 528, TOP_K, -1, EXPERTS + 2)
        cases.assert_like_torch(packed, batch, first_expert, "cuda")

    def test_one_expert_with_more_pairs_than_a_program_places(self) -> None:
        batch = cases.random_batch(4, 300, 128, 1, -1, 1)
        cases.assert_like_torch(cases.random_experts(4, 1, 128, 128), batch, 0, "cuda")

    @pytest.mark.parametrize(
        ("experts", "hidden", "intermediate", "top_k"),
        [(1, 16, 16, 1), (3, 128, 128, 2), (130, 48, 16, 8), (2, 7168, 2048, 2), (4, 2048, 768, 4)],
    )
    def test_any_shape_gives_what_torch_gives(self, experts: int, hidden: int, intermediate: int, top_k: int) -> None:
        packed = cases.random_experts(1, experts, hidden, intermediate)
        batch = cases.random_batch(1, 40, hidden, top_k, 0, experts)
        cases.assert_like_torch(packed, batch, 0, "cuda")

    @pytest.mark.parametrize("tiling", cases.TILINGS, ids=str)
    def test_every_tiling_gives_what_torch_gives(self, tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
        cases.use_tiling(monkeypatch, tiling)
        packed = cases.random_experts(2, 3, 512, 256)
        batch = cases.random_batch(2, 500, 512, 2, 0, 4)
        cases.assert_like_torch(packed, batch, 0, "cuda")

    @pytest.mark.parametrize("rows", [1, 3, 8])
    def test_few_pairs_with_wide_rows_are_cut_by_columns(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a rank with a few of DeepSeek-R1's 256 experts."""
        splits = cases.record_splits(monkeypatch)
        packed = cases.random_experts(4, 6, 7168, 256)
        batch = cases.random_batch(4, rows, 7168, 3, -1, 8)
        cases.assert_like_torch(packed, batch, 0, "cuda", num_experts=80)
        assert splits == [4]

    def test_bf16_results_are_near_those_of_torch(self) -> None:
        packed, batch = cases.random_experts(3, 4, 512, 256), cases.random_batch(3, 50, 512, 3, 0, 4)
        out = Nvfp4MoE(cases.experts_to(packed, "cuda"), 0)(*batch.to("cuda").arguments)
        assert out.dtype == torch.bfloat16
        cases.assert_close(out, cases.float64_reference(packed, batch, 0))

    def test_the_result_is_left_where_told_as_fp8_rows_too(self) -> None:
        packed, batch = cases.random_experts(3, 4, 512, 256), cases.random_batch(3, 50, 512, 3, 0, 4)
        moe = Nvfp4MoE(cases.experts_to(packed, "cuda"), 0)
        cases.assert_leaves_result_where_told(moe, batch.to("cuda"), 512)
        cases.assert_leaves_fp8_rows_where_told(moe, batch.to("cuda"), 512)

    def test_rows_of_several_passes_are_the_rows_of_one(self, moe: Nvfp4MoE, monkeypatch: pytest.MonkeyPatch) -> None:
        """Although the few of the last pass alone would be cut otherwise."""
        batch = batch_of(moe, 4, 4200)
        out = moe(*batch.arguments)
        monkeypatch.setattr(fused_moe, "_MAX_ROWS", 5000)
        assert torch.equal(out, moe(*batch.arguments))

    @pytest.mark.parametrize("rows", [30, 900])
    def test_the_order_of_rows_and_slots_does_not_matter(self, moe: Nvfp4MoE, rows: int) -> None:
        batch, order, slots = batch_of(moe, 5, rows), torch.randperm(rows), torch.tensor([2, 0, 1])
        out = moe(*batch.arguments)
        again = moe(
            batch.x_fp4[order],
            batch.x_scale.view(torch.uint8)[order].view(torch.float8_e4m3fn),
            batch.topk_ids[order][:, slots],
            batch.topk_weights[order][:, slots],
        )
        assert torch.equal(again, out[order])

    @pytest.mark.parametrize("rows", [30, 900])
    def test_a_nan_poisons_its_own_row_only(self, moe: Nvfp4MoE, rows: int) -> None:
        batch = batch_of(moe, 6, rows)
        batch.topk_ids[4] = torch.tensor([1, 0, 2])
        clean = moe(*batch.arguments)
        batch.x_scale.view(torch.uint8)[4, 2] = 0x7F
        out = moe(*batch.arguments)
        assert out[4].isnan().all()
        others = torch.arange(rows) != 4
        assert torch.equal(out[others], clean[others])

    def test_the_fields_of_wire_rows_go_in_as_they_are(self, moe: Nvfp4MoE) -> None:
        batch, layout = batch_of(moe, 7, 90), WireRowLayout(moe.hidden_size, TOP_K)
        fields = unpack(torch.zeros(90, layout.row_bytes, dtype=torch.uint8, device="cuda"), layout)
        views = cases.Batch(fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights)
        for view, tensor in zip(views.arguments, batch.arguments, strict=True):
            view.copy_(tensor)
        assert torch.equal(moe(*views.arguments), moe(*batch.arguments))

    @pytest.mark.parametrize("rows", [5, 200])
    def test_a_captured_graph_computes_what_its_inputs_hold_when_it_is_replayed(self, moe: Nvfp4MoE, rows: int) -> None:
        inputs = list(batch_of(moe, 8, rows).arguments)
        others = [list(batch_of(moe, seed, rows).arguments) for seed in (9, 10)]
        everybody_takes_one_expert = [*others[0][:2], torch.full_like(inputs[2], 3), others[0][3]]
        nobody_is_here = [*others[0][:2], torch.full_like(inputs[2], -1), others[0][3]]
        others += [everybody_takes_one_expert, nobody_is_here]
        assert_replays_what_inputs_hold(lambda: moe(*inputs), inputs, others)

    @pytest.mark.parametrize("rows", [5, 200])
    def test_calls_in_quick_succession_do_not_disturb_each_other(self, moe: Nvfp4MoE, rows: int) -> None:
        """They use the same memory, and their kernels start before those before them have ended."""
        batches = [batch_of(moe, seed, rows).arguments for seed in range(20)]
        alone = []
        for batch in batches:
            alone.append(moe(*batch))
            torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [moe(*batch) for batch in batches]
        graph.replay()
        assert all(map(torch.equal, captured, alone))
        assert all(map(torch.equal, [moe(*batch) for batch in batches], alone))

    def test_nothing_waits_for_the_device(self, moe: Nvfp4MoE) -> None:
        batch = batch_of(moe, 11, 40)
        torch.cuda.set_sync_debug_mode("error")
        try:
            moe(*batch.arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_zero_rows_keep_the_width(self, moe: Nvfp4MoE) -> None:
        assert moe(*(tensor[:0] for tensor in batch_of(moe, 12, 1).arguments)).shape == (0, moe.hidden_size)
