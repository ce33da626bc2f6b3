"""The Triton twins of the wire row, interpreted, give the bytes of the torch twins.

Where there is a GPU, test/gpu/test_wire_row_gpu.py runs them compiled instead.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wire_row_cases as cases
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4
from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.triton import wire_row

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")

layouts = st.builds(WireRowLayout, st.integers(1, 20).map(lambda blocks: blocks * 16), st.integers(1, 9))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def large_tiles() -> Iterator[None]:
    """Interpreting costs by the operation, hardly by the element."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"), cases.poisoned_allocations():
        patch.setattr(wire_row, "_TILE_BLOCKS", 2**16)
        patch.setattr(wire_row, "_UNPACK_TILE", 2**16)
        yield


class TestQuantizePack:
    @pytest.mark.parametrize("input_scale", cases.ORDINARY_SCALES)
    @pytest.mark.parametrize("largest", [0.0, 7.0])
    def test_every_bf16_value_packs_like_torch(self, largest: float, input_scale: float) -> None:
        x = cases.every_bf16_value(largest * input_scale)
        cases.assert_packs_like_torch(cases.with_routing(x), input_scale)

    @pytest.mark.parametrize("input_scale", cases.EXTREME_SCALES)
    def test_every_bf16_value_packs_like_torch_with_a_scale_at_the_ends_of_fp32(self, input_scale: float) -> None:
        cases.assert_packs_like_torch(cases.with_routing(cases.every_bf16_value(1.0)), input_scale)

    @pytest.mark.parametrize("input_scale", cases.ORDINARY_SCALES + cases.SCALES_WITH_INEXACT_RECIPROCAL)
    def test_values_at_and_beside_ties_pack_like_torch(self, input_scale: float) -> None:
        cases.assert_packs_like_torch(cases.with_routing(cases.near_ties(input_scale)), input_scale)

    @pytest.mark.parametrize("input_scale", cases.SCALES_WITH_INEXACT_RECIPROCAL)
    def test_multiplying_by_the_nearest_reciprocal_would_give_other_codes(self, input_scale: float) -> None:
        x, ties = cases.near_ties(input_scale).float().abs().numpy(), np.array(cases.E2M1_TIES, dtype=np.float32)
        scales = 1 + np.arange(8, dtype=np.float32)[:, None, None] / 8
        divisors = scales * np.float32(input_scale)
        quotients, products = (np.sign(y[..., None] - ties) for y in (x / divisors, x * (np.float32(1) / divisors)))
        assert (quotients != products).any()  # so the test above needs more than that

    @pytest.mark.parametrize("value_and_code", [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5, 6)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_a_tie_goes_to_the_even_code(self, value_and_code: tuple[float, int], dtype: torch.dtype) -> None:
        value, code = value_and_code
        x = torch.tensor([[value, -value] + [0.0] * 13 + [6.0]], dtype=dtype)  # its largest makes the block scale 1
        rows = wire_row.quantize_pack(*cases.with_routing(x), torch.tensor(1.0))
        assert rows[0, 0].item() == code | (code | 8) << 4

    @pytest.mark.parametrize("seed", range(2))
    def test_fp32_values_pack_like_torch(self, seed: int) -> None:
        rows = cases.random_rows(seed, 64, WireRowLayout(512, 3), torch.float32)
        cases.assert_packs_like_torch(rows, cases.typical_scale(rows[0]))
        cases.assert_packs_like_torch(cases.with_routing(cases.every_bf16_value(5.0, torch.float32)), 0.37)

    @settings(max_examples=12, deadline=None)
    @given(layouts, st.integers(1, 70), seeds, st.sampled_from([torch.bfloat16, torch.float32]))
    def test_any_shape_packs_like_torch_with_zeros_for_padding(
        self, layout: WireRowLayout, num_rows: int, seed: int, dtype: torch.dtype
    ) -> None:
        rows = cases.random_rows(seed, num_rows, layout, dtype)
        cases.assert_packs_like_torch(rows, cases.typical_scale(rows[0]))

    def test_small_tiles_and_programs_of_several_tiles_give_the_same_bytes(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = cases.random_rows(5, 9, WireRowLayout(208, 3))
        for name, value in {
            "_TILE_BLOCKS": 16,
            "_ROUTING_TILE": 16,
            "_MANY_BLOCKS": 0,
            "_TILES_PER_PROGRAM": 3,
        }.items():
            monkeypatch.setattr(wire_row, name, value)
        cases.assert_packs_like_torch(rows, cases.typical_scale(rows[0]))

    def test_a_nan_poisons_its_own_block_and_infinities_saturate_with_their_sign(self) -> None:
        layout = WireRowLayout(64, 2)
        rows = cases.random_rows(1, 3, layout)
        clean = wire_row.quantize_pack(*rows, torch.tensor(0.01))
        rows[0][1, 20], rows[0][2, 3], rows[0][2, 7] = torch.nan, torch.inf, -torch.inf
        cases.assert_packs_like_torch(rows, 0.01)
        fields = wire_row.unpack(wire_row.quantize_pack(*rows, torch.tensor(0.01)), layout)
        values = dequantize_nvfp4(fields.x_fp4, fields.x_scale)
        assert values.isnan().nonzero().tolist() == [[1, column] for column in range(16, 32)]
        assert values[2, [3, 7]].tolist() == [2688, -2688]
        before = dequantize_nvfp4(*(getattr(wire_row.unpack(clean, layout), name) for name in ("x_fp4", "x_scale")))
        assert torch.equal(values[0], before[0])
        assert torch.equal(values[1, 32:], before[1, 32:])

    def test_rows_packed_apart_are_the_rows_packed_together(self) -> None:
        rows = cases.random_rows(2, 6, WireRowLayout(64, 2))
        splits = zip(*(tensor.split([1, 0, 3, 2]) for tensor in rows), strict=True)
        apart = [wire_row.quantize_pack(*split, torch.tensor(0.01)) for split in splits]
        assert torch.equal(wire_row.quantize_pack(*rows, torch.tensor(0.01)), torch.cat(apart))

    def test_views_that_are_not_contiguous_or_not_aligned_pack_like_torch(self) -> None:
        x, topk_ids, topk_weights = cases.random_rows(3, 16, WireRowLayout(64, 8))
        shifted = x.flatten()[1:769].view(12, 64)
        for view in (x[:, 16:48], x[::2], shifted):
            rows = (view, topk_ids[: len(view), 2:5], topk_weights[: len(view), ::3])
            cases.assert_packs_like_torch(rows, cases.typical_scale(x))

    def test_an_idle_rank_launches_nothing_and_packs_an_empty_buffer_of_the_right_width(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wire_row, "_quantize_pack_kernel", None)
        monkeypatch.setattr(wire_row, "_unpack_kernel", None)
        layout = WireRowLayout(64, 4)
        rows = wire_row.quantize_pack(*cases.with_routing(torch.empty(0, 64), 4), torch.tensor(1.0))
        assert (rows.shape, rows.dtype) == ((0, layout.row_bytes), torch.uint8)
        for swizzled in (False, True):
            cases.assert_unpacks_like_torch(rows, layout, swizzled)

    def test_a_width_that_is_not_made_of_blocks_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"multiple of 16.*got 24"):
            wire_row.quantize_pack(*cases.with_routing(torch.zeros(2, 24)), torch.tensor(1.0))


class TestUnpack:
    @settings(max_examples=20, deadline=None)
    @given(layouts, st.integers(1, 300), st.booleans(), seeds)
    def test_any_bytes_unpack_like_torch_also_when_padding_is_not_zero(
        self, layout: WireRowLayout, num_rows: int, swizzled: bool, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, 256, (num_rows, layout.row_bytes), dtype=torch.uint8, generator=generator)
        cases.assert_unpacks_like_torch(rows, layout, swizzled)

    @pytest.mark.parametrize("swizzled", [False, True])
    def test_small_tiles_unpack_like_torch(self, monkeypatch: pytest.MonkeyPatch, swizzled: bool) -> None:
        monkeypatch.setattr(wire_row, "_UNPACK_TILE", 256)
        layout = WireRowLayout(208, 3)
        rows = torch.arange(9 * layout.row_bytes).to(torch.uint8).view(9, -1)
        cases.assert_unpacks_like_torch(rows, layout, swizzled)

    def test_a_slice_of_the_gathered_rows_unpacks_into_memory_of_its_own(self) -> None:
        layout = WireRowLayout(32, 2)
        gathered = wire_row.quantize_pack(*cases.random_rows(4, 8, layout), torch.tensor(0.01))
        cases.assert_unpacks_like_torch(gathered[3:], layout, swizzled=False)
        before = gathered.clone()
        fields = wire_row.unpack(gathered[3:], layout)
        for field in (fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights):
            field.view(torch.uint8).fill_(0xFF)
        assert torch.equal(gathered, before)

    def test_rows_of_another_layout_are_refused(self) -> None:
        rows = torch.zeros(2, WireRowLayout(64, 4).row_bytes, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"rows of 80 bytes do not fit the layout of 144 bytes .hidden_size 128"):
            wire_row.unpack(rows, WireRowLayout(128, 8))
