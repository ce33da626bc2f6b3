"""The Triton twins of the wire row, compiled, give the bytes of the torch twins."""

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

import wire_row_cases as cases
from nibble.kernels.torch import wire_row as reference
from nibble.kernels.torch.nvfp4 import input_scale_from_amax
from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.triton import wire_row
from nibble.kernels.triton.nvfp4 import corrected_reciprocal, e2m1_code, float_bits, reciprocal_corrections

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]
LAYOUTS = [WireRowLayout(*sizes) for sizes in ((16, 1), (48, 3), (208, 1), (2880, 4), (7168, 8))]


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    with cases.poisoned_allocations():
        yield


@triton.jit
def _check_mantissas(choices_ptr, wrong_ptr, first):
    """For an input scale from 1 to 2: how its eight reciprocals are chosen (0 to divide), and whether that is wrong."""
    input_scale = (0x3F800000 + first + tl.program_id(0)).to(tl.float32, bitcast=True)
    corrections, multiply = reciprocal_corrections(input_scale)
    lane = tl.arange(0, 256)
    scale = (lane % 8).to(tl.float32) * 0.125 + 1.0
    tie = lane // 8 % 8
    tie = tl.where(tie < 4, tie * 0.5 + 0.25, tl.where(tie == 6, 5.0, (tie % 4).to(tl.float32) + 2.5))  # and 5.5
    nearest = (float_bits(tie * scale * input_scale) + 0x8000) & -0x10000
    x = (nearest + (lane // 64 - 1) * 0x10000).to(tl.float32, bitcast=True)  # that, one bf16 below, one and two above
    product = x * corrected_reciprocal(scale, scale * input_scale, corrections)
    differs = e2m1_code(product) != e2m1_code(tl.div_rn(x, scale * input_scale))
    tl.store(choices_ptr + tl.program_id(0), tl.where(multiply, corrections, 0))
    tl.store(wrong_ptr + tl.program_id(0), multiply & (tl.max(differs.to(tl.int32), axis=0) == 1))


class TestQuantizePack:
    @pytest.mark.parametrize("input_scale", cases.ORDINARY_SCALES + cases.EXTREME_SCALES)
    @pytest.mark.parametrize("largest", [0.0, 7.0, 300.0])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_bf16_value_packs_like_torch(self, largest: float, input_scale: float, dtype: torch.dtype) -> None:
        x = cases.every_bf16_value(largest * min(input_scale, 1e4), dtype)
        cases.assert_packs_like_torch(cases.with_routing(x), input_scale, "cuda")

    @pytest.mark.parametrize("input_scale", cases.ORDINARY_SCALES + cases.SCALES_WITH_INEXACT_RECIPROCAL)
    def test_values_at_and_beside_ties_pack_like_torch(self, input_scale: float) -> None:
        cases.assert_packs_like_torch(cases.with_routing(cases.near_ties(input_scale)), input_scale, "cuda")

    def test_for_every_mantissa_of_the_input_scale_multiplying_gives_the_codes_of_dividing(self) -> None:
        choices = torch.zeros(2**23, dtype=torch.int32, device="cuda")
        wrong = torch.ones(2**23, dtype=torch.bool, device="cuda")
        for first in range(0, 2**23, 2**20):
            arguments = (choices[first:], wrong[first:], first)
            _check_mantissas[(2**20,)](*arguments, num_warps=1, enable_fp_fusion=False)
        assert not wrong.any()
        assert 0 < (choices == 0).sum().item() < 100  # mantissas for which it divides
        assert (choices != 0x11111111).sum().item() > 500  # for which the nearest reciprocal is not enough

    @pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_shape_packs_like_torch_with_zeros_for_padding(self, layout: WireRowLayout, dtype: torch.dtype) -> None:
        for num_rows in (1, 2, 7, 64, 129):
            rows = cases.random_rows(num_rows, num_rows, layout, dtype)
            cases.assert_packs_like_torch(rows, cases.typical_scale(rows[0]), "cuda")

    @pytest.mark.parametrize("num_rows", [4096, 4099])
    def test_batches_that_give_programs_several_tiles_pack_like_torch(self, num_rows: int) -> None:
        rows = cases.random_rows(0, num_rows, WireRowLayout(7168, 8))
        cases.assert_packs_like_torch(rows, cases.typical_scale(rows[0]), "cuda")

    def test_nan_and_infinity_pack_like_torch(self) -> None:
        rows = cases.random_rows(1, 64, WireRowLayout(512, 2))
        for row, value in enumerate([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0]):
            rows[0][row, row * 37 + 1] = value
            rows[0][row + 8, 64:80] = value
        for dtype in DTYPES:
            cases.assert_packs_like_torch((rows[0].to(dtype), *rows[1:]), 0.01, "cuda")

    def test_an_idle_rank_packs_an_empty_buffer_of_the_right_width(self) -> None:
        layout = WireRowLayout(64, 4)
        rows = cases.with_routing(torch.empty(0, 64, dtype=torch.bfloat16), 4)
        cases.assert_packs_like_torch(rows, 1.0, "cuda")
        cases.assert_unpacks_like_torch(reference.quantize_pack(*rows, torch.tensor(1.0)), layout, True, "cuda")


class TestUnpack:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
    @pytest.mark.parametrize("swizzled", [False, True])
    def test_any_bytes_unpack_like_torch(self, layout: WireRowLayout, swizzled: bool) -> None:
        for num_rows in (1, 31, 127, 128, 129, 300):
            rows = torch.randint(0, 256, (num_rows, layout.row_bytes), dtype=torch.uint8)
            cases.assert_unpacks_like_torch(rows, layout, swizzled, "cuda")


class TestGraphs:
    def test_a_captured_graph_packs_and_unpacks_what_its_inputs_hold_when_it_is_replayed(self) -> None:
        layout = WireRowLayout(2048, 8)
        inputs = [tensor.cuda() for tensor in cases.random_rows(2, 48, layout)]
        scale = torch.tensor(0.01, device="cuda")

        def run() -> tuple[torch.Tensor, ...]:
            rows = wire_row.quantize_pack(*inputs, scale)
            fields = wire_row.unpack(rows, layout, swizzled=True)
            return rows, fields.x_fp4, fields.x_scale.view(torch.uint8), fields.topk_ids, fields.topk_weights

        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for seed in (3, 4):
            for tensor, value in zip(inputs, cases.random_rows(seed, 48, layout), strict=True):
                tensor.copy_(value)
            scale.copy_(input_scale_from_amax(inputs[0].abs().amax()))
            graph.replay()
            for got, expected in zip(captured, run(), strict=True):
                assert torch.equal(got, expected)
            assert torch.equal(captured[0].cpu(), reference.quantize_pack(*(t.cpu() for t in inputs), scale.cpu()))

    def test_nothing_waits_for_the_device(self) -> None:
        inputs = [tensor.cuda() for tensor in cases.random_rows(5, 9, WireRowLayout(64, 2))]
        scale = torch.tensor(0.01, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            wire_row.unpack(wire_row.quantize_pack(*inputs, scale), WireRowLayout(64, 2), swizzled=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
