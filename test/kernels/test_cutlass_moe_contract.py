"""How FlashInfer's CUTLASS experts are called, without a GPU that runs them.

The stand-in checks the arguments and computes from their bytes; the result has to be the torch implementation's.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flashinfer_stand_in as stand_in
import fused_moe_cases as cases
from fused_moe_cases import INPUT_SCALE, Batch
from nibble.kernels.flashinfer.cutlass_moe import CutlassNvfp4MoE
from nibble.kernels.select import select_kernels
from nibble.kernels.torch.fused_moe import Nvfp4MoE as TorchMoE
from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack, unpack

EXPERTS, TOP_K = 6, 3
Arguments = dict[str, Any]

# Hidden and intermediate size: whole tiles of scales, ones that end within a tile, and ones that need padding.
SIZES = [(128, 128), (256, 64), (192, 192), (128, 48), (64, 80), (80, 48), (16, 16), (48, 128)]


@pytest.fixture(autouse=True)
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, stand_in.cutlass_fused_moe)


def assert_like_torch(moe: CutlassNvfp4MoE, packed: PackedNvfp4Experts, batch: Batch, first_expert: int = 0) -> None:
    """Equal but for the rounding to bf16. Few of the second quantization's codes change with the order of a sum."""
    got = moe(*batch.arguments)
    expected = TorchMoE(packed, first_expert)(*batch.arguments)
    assert (got.dtype, got.shape) == (torch.bfloat16, expected.shape)
    assert got.is_contiguous()
    assert (got.double() - expected.double()).norm() <= 0.004 * expected.double().norm()


@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_it_computes_what_torch_computes(rows: int, hidden: int, intermediate: int) -> None:
    packed = cases.random_experts(hidden, EXPERTS, hidden, intermediate)
    batch = cases.random_batch(rows, rows, hidden, TOP_K, 0, EXPERTS)
    assert_like_torch(CutlassNvfp4MoE(packed, 0), packed, batch)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_each_rank_computes_its_experts_and_nobody_elses(ranks: int) -> None:
    """Among the ids are -1, which is nobody's, and rows without any id of a rank: exact zeros there."""
    packed = cases.random_experts(1, EXPERTS, 128, 80)
    batch = cases.random_batch(ranks, 30, 128, TOP_K, -1, EXPERTS)
    share = EXPERTS // ranks
    for first in range(0, EXPERTS, share):
        local = cases.slice_experts(packed, first, first + share)
        moe = CutlassNvfp4MoE(local, first, EXPERTS)
        assert_like_torch(moe, local, batch, first)
        nobodys = ((batch.topk_ids < first) | (batch.topk_ids >= first + share)).all(dim=1)
        assert not moe(*batch.arguments)[nobodys].any()


def test_rows_of_other_ranks_only_give_zeros() -> None:
    packed = cases.random_experts(2, 3, 64, 64)
    batch = cases.random_batch(2, 5, 64, TOP_K, 3, 6)
    assert not CutlassNvfp4MoE(packed, 0, 6)(*batch.arguments).any()


@pytest.mark.parametrize("hidden", [80, 128])
def test_the_result_is_left_where_told(hidden: int) -> None:
    packed = cases.random_experts(3, EXPERTS, hidden, 64)
    batch = cases.random_batch(3, 5, hidden, TOP_K, 0, EXPERTS)
    cases.assert_leaves_result_where_told(CutlassNvfp4MoE(packed, 0), batch, hidden)
    cases.assert_leaves_fp8_rows_where_told(CutlassNvfp4MoE(packed, 0), batch, hidden)


@pytest.mark.parametrize("hidden", [80, 128])
def test_no_rows_launch_nothing(hidden: int) -> None:
    packed = cases.random_experts(3, EXPERTS, hidden, 64)
    out = CutlassNvfp4MoE(packed, 0)(*cases.random_batch(3, 0, hidden, TOP_K, 0, EXPERTS).arguments)
    assert (out.shape, out.dtype) == ((0, hidden), torch.bfloat16)


@pytest.mark.parametrize("up_to_gate", [1e-3, 0.3, 1.0, 7.0, 500.0])
def test_gate_and_up_may_have_different_scales(up_to_gate: float) -> None:
    packed = cases.random_experts(4, EXPERTS, 128, 64)
    gate = packed.g1_gate_up[:, 0]
    ratio = up_to_gate * (1 + torch.arange(EXPERTS) / 10)
    packed = replace(
        packed, g1_gate_up=torch.stack([gate, gate * ratio], dim=1), w2_input_scale=packed.w2_input_scale * ratio
    )
    assert_like_torch(CutlassNvfp4MoE(packed, 0), packed, cases.random_batch(4, 20, 128, TOP_K, 0, EXPERTS))


def test_a_gate_of_zeros_gives_zeros() -> None:
    """ModelOpt gives a matrix of zeros the scale 0."""
    packed = cases.random_experts(5, EXPERTS, 64, 64)
    packed.g1_gate_up[:, 0] = 0
    out = CutlassNvfp4MoE(packed, 0)(*cases.random_batch(5, 4, 64, TOP_K, 0, EXPERTS).arguments)
    assert not out.any()


@pytest.mark.parametrize("hidden", [48, 80, 256])
@pytest.mark.parametrize("rows", [1, 9])
def test_rows_come_straight_from_the_gather(rows: int, hidden: int) -> None:
    """The fields of a wire row are views with the stride of the row, and stay as they are."""
    packed = cases.random_experts(6, EXPERTS, hidden, 64)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, hidden, generator=generator)
    topk_ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K).indices.int()
    wire = quantize_pack(x, topk_ids, torch.rand(rows, TOP_K, generator=generator), INPUT_SCALE)
    before = wire.clone()
    fields = unpack(wire, WireRowLayout(hidden, TOP_K))
    batch = Batch(fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights)
    assert_like_torch(CutlassNvfp4MoE(packed, 0), packed, batch)
    assert torch.equal(wire, before)


def test_results_are_fresh() -> None:
    packed = cases.random_experts(7, EXPERTS, 64, 64)
    moe = CutlassNvfp4MoE(packed, 0)
    first = moe(*cases.random_batch(7, 5, 64, TOP_K, 0, EXPERTS).arguments)
    kept = first.clone()
    moe(*cases.random_batch(8, 5, 64, TOP_K, 0, EXPERTS).arguments)
    assert torch.equal(first, kept)


def test_the_order_of_the_last_sum_is_asked_for_where_flashinfer_lets_it_be(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(monkeypatch, stand_in.cutlass_fused_moe_0_6_15)
    packed = cases.random_experts(8, EXPERTS, 64, 64)
    assert_like_torch(CutlassNvfp4MoE(packed, 0), packed, cases.random_batch(8, 5, 64, TOP_K, 0, EXPERTS))


def test_shares_of_different_sizes_are_refused() -> None:
    packed = cases.random_experts(9, 4, 64, 64)
    for first_expert, num_experts in ((0, 6), (2, 8)):
        with pytest.raises(ValueError, match="equal shares"):
            CutlassNvfp4MoE(packed, first_expert, num_experts)


def test_it_is_what_moe_kernel_flashinfer_cutlass_selects() -> None:
    assert select_kernels("triton", "flashinfer_cutlass").nvfp4_moe is CutlassNvfp4MoE


# The contract notices mistakes. Each of these, made on purpose, has to fail the comparison above.


def halves_swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1).contiguous()


def linear(tiles: Tensor) -> Tensor:
    """The scales row by row, as a checkpoint has them."""
    _, rows, words = tiles.shape
    offsets = stand_in.tile_offsets(rows, 4 * words)
    return tiles.view(torch.uint8).flatten(1)[:, offsets].contiguous().view(torch.int32)


def padded_at_the_end(weights: Tensor) -> Tensor:
    """64 padded rows of each half whose last 16 are zeros, as 48, 48 and 32 zeros."""
    up, gate = (half[:, :48] for half in weights.chunk(2, dim=1))
    return torch.cat([up, gate, torch.zeros_like(weights[:, :32])], dim=1)


def changed_scales(index: int, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Arguments]:
    def apply(arguments: Arguments) -> Arguments:
        scales = list(arguments["quant_scales"])
        scales[index] = change(scales[index])
        return arguments | {"quant_scales": scales}

    return apply


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: arguments | {name: change(arguments[name])}


def swapped_scales(first: int, second: int) -> Callable[[Arguments], Arguments]:
    def apply(arguments: Arguments) -> Arguments:
        scales = list(arguments["quant_scales"])
        scales[first], scales[second] = scales[second], scales[first]
        return arguments | {"quant_scales": scales}

    return apply


MISTAKES = {
    "gate before up": changed("fc1_expert_weights", halves_swapped),
    "scales of gate before those of up": changed_scales(1, halves_swapped),
    "padding at the end": changed("fc1_expert_weights", padded_at_the_end),
    "linear scales of w13": changed_scales(1, linear),
    "linear scales of w2": changed_scales(4, linear),
    "alphas of the wrong product": swapped_scales(2, 5),
    "scale of the intermediate where an alpha belongs": swapped_scales(3, 5),
    "one scale of the intermediate for all experts": changed_scales(3, lambda scale: scale[:1].expand_as(scale) + 0),
    "inverse scale of the intermediate": changed_scales(3, torch.reciprocal),
    "another rank's share": changed("ep_rank", lambda rank: 1 - rank),
    "local expert ids": changed("token_selected_experts", lambda ids: ids % 3),
    "scales announced as swizzled": changed("swizzled_input_sf", lambda _: True),
    "strided ids": changed("token_selected_experts", lambda ids: ids.T.contiguous().T),
    "weights of bytes": changed("fc2_expert_weights", lambda weights: weights.view(torch.uint8)),
    "a scale of the rows for each expert": changed_scales(0, lambda scale: scale.expand(3).contiguous()),
    "fewer rows tuned for than come": changed("tune_max_num_tokens", lambda _: 8),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_contract_notices(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whole tiles of scales in each half, so that the halves of the scales can be exchanged; 48 is for the padding.
    intermediate = 48 if mistake == "padding at the end" else 128
    packed = cases.slice_experts(cases.random_experts(10, 6, 128, intermediate), 3, 6)
    batch = cases.random_batch(10, 40, 128, TOP_K, 0, 6)
    assert_like_torch(CutlassNvfp4MoE(packed, 3, 6), packed, batch, 3)
    stand_in.install(monkeypatch, lambda **arguments: stand_in.cutlass_fused_moe(**MISTAKES[mistake](arguments)))
    with pytest.raises(AssertionError):
        assert_like_torch(CutlassNvfp4MoE(packed, 3, 6), packed, batch, 3)
