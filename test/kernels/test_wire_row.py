"""The wire row is a format: its bytes are the same on every backend, so its layout is pinned here."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nibble.kernels.torch.nvfp4 import quantize_nvfp4
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack, unpack

layouts = st.builds(WireRowLayout, st.integers(1, 20).map(lambda blocks: blocks * 16), st.integers(1, 9))
INPUT_SCALE = torch.tensor(0.001)


def random_rows(seed: int, rows: int, layout: WireRowLayout) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, layout.hidden_size, generator=generator).bfloat16(),
        torch.randint(-1, 1000, (rows, layout.top_k), dtype=torch.int32, generator=generator),
        torch.rand(rows, layout.top_k, generator=generator),
    )


class TestLayout:
    def test_deepseek_r1_takes_4096_bytes_a_row(self) -> None:
        layout = WireRowLayout(hidden_size=7168, top_k=8)
        assert (layout.scale_offset, layout.ids_offset, layout.weights_offset) == (3584, 4032, 4064)
        assert layout.row_bytes == 4096

    def test_qwen3_30b_a3b_is_padded_to_16_bytes(self) -> None:
        layout = WireRowLayout(hidden_size=2048, top_k=8)
        assert (layout.scale_offset, layout.ids_offset, layout.weights_offset) == (1024, 1152, 1184)
        assert layout.row_bytes == 1216
        assert WireRowLayout(hidden_size=16, top_k=1).row_bytes == 32  # 8 + 1, 3 of padding, 4 + 4, 12 of padding

    @given(layouts)
    def test_fields_are_in_order_aligned_and_do_not_overlap(self, layout: WireRowLayout) -> None:
        assert layout.scale_offset == layout.hidden_size // 2
        assert 0 <= layout.ids_offset - (layout.scale_offset + layout.hidden_size // 16) < 4
        assert layout.ids_offset % 4 == 0
        assert layout.weights_offset == layout.ids_offset + 4 * layout.top_k
        assert 0 <= layout.row_bytes - (layout.weights_offset + 4 * layout.top_k) < 16
        assert layout.row_bytes % 16 == 0

    @pytest.mark.parametrize("hidden_size", [0, -16, 8, 100])
    def test_a_hidden_size_without_whole_blocks_is_refused(self, hidden_size: int) -> None:
        with pytest.raises(ValueError, match=rf"hidden_size must be a positive multiple of 16.*got {hidden_size}"):
            WireRowLayout(hidden_size=hidden_size, top_k=2)

    def test_a_row_without_experts_is_refused(self) -> None:
        with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
            WireRowLayout(hidden_size=64, top_k=0)


class TestRows:
    @settings(deadline=None)
    @given(layouts, st.integers(0, 5), st.integers(0, 2**32 - 1))
    def test_what_was_packed_comes_back(self, layout: WireRowLayout, rows: int, seed: int) -> None:
        x, topk_ids, topk_weights = random_rows(seed, rows, layout)
        packed, scales = quantize_nvfp4(x, INPUT_SCALE)
        fields = unpack(quantize_pack(x, topk_ids, topk_weights, INPUT_SCALE), layout)
        assert torch.equal(fields.x_fp4, packed)
        assert fields.x_scale.dtype == torch.float8_e4m3fn
        assert torch.equal(fields.x_scale.float(), scales.float())
        assert fields.topk_ids.dtype == torch.int32
        assert torch.equal(fields.topk_ids, topk_ids)
        assert fields.topk_weights.dtype == torch.float32
        assert torch.equal(fields.topk_weights, topk_weights)

    def test_every_byte_is_where_the_format_says_and_padding_is_zero(self) -> None:
        layout = WireRowLayout(hidden_size=48, top_k=3)
        x, topk_ids, topk_weights = random_rows(0, 4, layout)
        rows = quantize_pack(x, topk_ids, topk_weights, INPUT_SCALE)
        packed, scales = quantize_nvfp4(x, INPUT_SCALE)
        assert rows.dtype == torch.uint8
        for row in range(4):
            expected = packed[row].numpy().tobytes() + scales.view(torch.uint8)[row].numpy().tobytes() + bytes(1)
            expected += topk_ids[row].numpy().astype("<i4").tobytes()
            expected += topk_weights[row].numpy().astype("<f4").tobytes() + bytes(12)
            assert rows[row].numpy().tobytes() == expected

    def test_rows_packed_apart_are_the_rows_packed_together(self) -> None:
        layout = WireRowLayout(hidden_size=64, top_k=2)
        x, topk_ids, topk_weights = random_rows(1, 6, layout)
        together = quantize_pack(x, topk_ids, topk_weights, INPUT_SCALE)
        splits = zip(*(tensor.split([1, 0, 3, 2]) for tensor in (x, topk_ids, topk_weights)), strict=True)
        apart = [quantize_pack(*split, INPUT_SCALE) for split in splits]
        assert torch.equal(together, torch.cat(apart))

    @pytest.mark.parametrize("sizes", [[1, 0, 3, 2], [130, 1], [128, 128]])
    def test_block_scales_are_not_swizzled_before_the_gather(self, sizes: list[int]) -> None:
        """Swizzled scales would come in tiles of 128 rows, padded on each rank."""
        layout = WireRowLayout(hidden_size=64, top_k=2)
        x, topk_ids, topk_weights = random_rows(5, sum(sizes), layout)
        splits = zip(*(tensor.split(sizes) for tensor in (x, topk_ids, topk_weights)), strict=True)
        gathered = torch.cat([quantize_pack(*split, INPUT_SCALE) for split in splits])
        assert gathered.shape == (sum(sizes), layout.row_bytes)
        _, scales = quantize_nvfp4(x, INPUT_SCALE)
        assert torch.equal(unpack(gathered, layout).x_scale.view(torch.uint8), scales.view(torch.uint8))

    def test_fields_are_views_also_of_a_slice_of_the_gathered_rows(self) -> None:
        layout = WireRowLayout(hidden_size=32, top_k=2)
        gathered = quantize_pack(*random_rows(2, 8, layout), INPUT_SCALE)
        fields = unpack(gathered[3:], layout)
        fields.topk_ids.fill_(-1)
        fields.topk_weights.zero_()
        fields.x_fp4.zero_()
        fields.x_scale.view(torch.uint8).zero_()
        assert gathered[3:, layout.ids_offset : layout.weights_offset].eq(255).all()
        assert gathered[:3].any(dim=1).all()
        gathered[3:, layout.ids_offset : layout.weights_offset] = 0
        assert not gathered[3:].any()

    def test_an_idle_rank_packs_an_empty_buffer_of_the_right_width(self) -> None:
        layout = WireRowLayout(hidden_size=64, top_k=4)
        rows = quantize_pack(*random_rows(3, 0, layout), INPUT_SCALE)
        assert (rows.shape, rows.dtype) == ((0, layout.row_bytes), torch.uint8)
        fields = unpack(rows, layout)
        assert (fields.x_fp4.shape, fields.x_scale.shape) == ((0, 32), (0, 4))
        assert (fields.topk_ids.shape, fields.topk_weights.shape) == ((0, 4), (0, 4))

    def test_rows_of_another_layout_are_refused(self) -> None:
        rows = quantize_pack(*random_rows(4, 2, WireRowLayout(hidden_size=64, top_k=4)), INPUT_SCALE)
        with pytest.raises(ValueError, match=r"rows of 80 bytes do not fit the layout of 144 bytes .hidden_size 128"):
            unpack(rows, WireRowLayout(hidden_size=128, top_k=8))
