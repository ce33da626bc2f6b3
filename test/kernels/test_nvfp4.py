"""NVFP4 arithmetic against a reference that rounds in float64 by comparing distances."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from nibble.kernels.torch.nvfp4 import (
    BLOCK_SIZE,
    dequantize_nvfp4,
    fake_quantize_nvfp4,
    input_scale_from_amax,
    quantize_nvfp4,
    quantize_nvfp4_weight,
    swizzle_scales,
    unswizzle_scales,
)

E2M1_GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3_GRID = np.array([m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127])
ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
SMALLEST_NORMAL_E4M3 = 2.0**-6


def nearest_even(values: npt.NDArray[np.floating], grid: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Index of the nearest grid point, ties to the even index, saturating at the last."""
    values = values.astype(np.float64)
    above = np.searchsorted(grid, values).clip(0, len(grid) - 1)
    below = (above - 1).clip(0)
    to_above, to_below = grid[above] - values, values - grid[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    return np.where(take_below, below, above)


def reference_quantize(x: Tensor, input_scale: Tensor) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The contract of nvfp4.py, step by step, in numpy. Returns codes [T, K] (not packed) and scale bytes."""
    blocks = x.float().numpy().reshape(x.shape[0], -1, BLOCK_SIZE)
    scale = input_scale.numpy()
    with np.errstate(all="ignore"):
        amax = np.abs(blocks).max(axis=-1, keepdims=True)
        wanted = amax / (np.float32(6) * scale)
        scale_bytes = np.where(np.isnan(wanted), 0x7F, nearest_even(np.nan_to_num(wanted), E4M3_GRID))
        sf = np.append(E4M3_GRID, np.nan)[scale_bytes].astype(np.float32)
        divisor = np.where(sf == 0, np.float32(np.inf), sf * scale)
        y = blocks / divisor
    magnitude = nearest_even(np.nan_to_num(np.abs(y)), E2M1_GRID)
    codes = np.where(np.isnan(sf), 0, magnitude + 8 * np.signbit(blocks))
    return codes.reshape(x.shape).astype(np.uint8), scale_bytes[..., 0].astype(np.uint8)


def unpacked_codes(packed: Tensor) -> npt.NDArray[np.uint8]:
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(1).numpy()


def assert_follows_contract(x: Tensor, input_scale: Tensor) -> None:
    packed, scales = quantize_nvfp4(x, input_scale)
    codes, scale_bytes = reference_quantize(x, input_scale)
    np.testing.assert_array_equal(scales.view(torch.uint8).numpy(), scale_bytes)
    np.testing.assert_array_equal(unpacked_codes(packed), codes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, except that any NaN equals any NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(nan=0).view(torch.int32), b.nan_to_num(nan=0).view(torch.int32)
    )


def gaussian(seed: int, rows: int, columns: int, spread: float = 3.0) -> Tensor:
    """Normal values whose blocks differ in size by factors of e^spread."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(rows, columns // BLOCK_SIZE, BLOCK_SIZE, generator=generator)
    sizes = torch.randn(rows, columns // BLOCK_SIZE, 1, generator=generator).mul_(spread).exp_()
    return (blocks * sizes).view(rows, columns)


float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
any_float32 = st.one_of(float32, st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0]))
scales_in_use = st.floats(2.0**-40, 2.0**10, width=32).map(torch.tensor)
seeds = st.integers(0, 2**32 - 1)
no_deadline = settings(deadline=None)


@st.composite
def matrices(draw: st.DrawFn, elements: st.SearchStrategy[float] = float32) -> Tensor:
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 3).map(lambda blocks: blocks * BLOCK_SIZE)))
    return torch.from_numpy(draw(arrays(np.float32, shape, elements=elements)))


class TestRounding:
    def test_every_bf16_value_up_to_6_rounds_to_the_nearest_e2m1_ties_to_even(self) -> None:
        values = ALL_BF16[ALL_BF16.abs() <= 6]
        x = torch.zeros(len(values), BLOCK_SIZE, dtype=torch.bfloat16)
        x[:, 0] = 6  # with an input scale of 1 this makes the block scale 1, so that the code is that of x
        x[:, 5] = values
        packed, scales = quantize_nvfp4(x, torch.tensor(1.0))
        assert (scales.float() == 1).all()
        expected = nearest_even(values.float().abs().numpy(), E2M1_GRID) + 8 * np.signbit(values.float().numpy())
        np.testing.assert_array_equal(unpacked_codes(packed)[:, 5], expected)

    @pytest.mark.parametrize(("tie", "even"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4)])
    def test_a_tie_goes_to_the_even_mantissa_and_its_neighbours_do_not(self, tie: float, even: float) -> None:
        below, above = (float(np.nextafter(np.float32(tie), np.float32(side))) for side in (0, 9))
        x = torch.tensor([[6, tie, below, above, -tie, -below, -above] + [0.0] * 9])
        got = fake_quantize_nvfp4(x, torch.tensor(1.0))[0, 1:7].tolist()
        low, high = (float(E2M1_GRID[nearest_even(np.array([v]), E2M1_GRID)[0]]) for v in (below, above))
        assert low < tie < high
        assert got == [even, low, high, -even, -low, -high]

    def test_every_bf16_value_as_block_maximum_gives_the_nearest_e4m3_scale(self) -> None:
        values = ALL_BF16[~ALL_BF16.isnan()]
        x = values.unsqueeze(1).repeat(1, BLOCK_SIZE)
        scale = torch.tensor(1 / 6)
        assert (scale * 6).item() == 1  # so that the wanted block scale is the value itself
        _, scales = quantize_nvfp4(x, scale)
        expected = nearest_even(values.float().abs().numpy(), E4M3_GRID)
        np.testing.assert_array_equal(scales.view(torch.uint8)[:, 0].numpy(), expected)

    @pytest.mark.parametrize("input_scale", [1.0, 2.0**-12, 0.37, 3e-5, 1e4])
    def test_every_bf16_value_alone_in_its_block_follows_the_contract(self, input_scale: float) -> None:
        x = torch.zeros(65536, BLOCK_SIZE, dtype=torch.bfloat16)
        x[:, 3] = ALL_BF16
        assert_follows_contract(x, torch.tensor(input_scale))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("seed", range(4))
    def test_random_blocks_of_all_sizes_follow_the_contract(self, dtype: torch.dtype, seed: int) -> None:
        x = gaussian(seed, 256, 512).to(dtype)
        assert_follows_contract(x, input_scale_from_amax(x.abs().amax() / 10**seed))

    @no_deadline
    @given(matrices(any_float32), scales_in_use)
    def test_any_values_follow_the_contract(self, x: Tensor, input_scale: Tensor) -> None:
        assert_follows_contract(x, input_scale)

    def test_one_input_scale_per_row_is_that_row_alone_with_its_scale(self) -> None:
        x, input_scales = gaussian(1, 8, 64), torch.rand(8, 1) + 0.01
        packed, scales = quantize_nvfp4(x, input_scales)
        for row in range(8):
            alone_packed, alone_scales = quantize_nvfp4(x[row : row + 1], input_scales[row, 0])
            assert torch.equal(packed[row : row + 1], alone_packed)
            assert torch.equal(scales[row : row + 1].view(torch.uint8), alone_scales.view(torch.uint8))
        assert same_bits(fake_quantize_nvfp4(x, input_scales), dequantize_nvfp4(packed, scales))

    def test_a_tensor_that_is_not_contiguous_gives_the_same_bytes(self) -> None:
        x = gaussian(2, 64, 32)
        for view in (x.t(), x[:, 16:], x[::3]):
            packed, scales = quantize_nvfp4(view, torch.tensor(0.01))
            expected_packed, expected_scales = quantize_nvfp4(view.contiguous(), torch.tensor(0.01))
            assert torch.equal(packed, expected_packed)
            assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))
            assert same_bits(fake_quantize_nvfp4(view, torch.tensor(0.01)), dequantize_nvfp4(packed, scales))

    def test_quantizing_leaves_its_input_alone(self) -> None:
        x = gaussian(3, 4, 64)
        before = x.clone()
        quantize_nvfp4(x, torch.tensor(0.01))
        fake_quantize_nvfp4(x, torch.tensor(0.01))
        assert torch.equal(x, before)


class TestSpecialValues:
    def test_sf_of_zero_gives_zeros_never_nan(self) -> None:
        x = torch.full((2, 32), 1e-6)
        x[0, :16] = 0
        x[1, 16:] = 100.0
        input_scale = torch.tensor(100 / 2688)
        packed, scales = quantize_nvfp4(x, input_scale)
        assert scales.float().tolist() == [[0, 0], [0, 448]]
        assert not packed[0].any()
        values = dequantize_nvfp4(packed, scales, input_scale)
        assert not values[0].any()
        assert not values.isnan().any()
        assert not fake_quantize_nvfp4(x, input_scale).isnan().any()

    @pytest.mark.parametrize("bad", [0x7FC0, 0xFFC0, 0x7F81, 0xFFFF])
    def test_a_nan_poisons_its_own_block_and_nothing_else(self, bad: int) -> None:
        x = gaussian(4, 3, 64).bfloat16()
        clean_packed, clean_scales = quantize_nvfp4(x, torch.tensor(0.01))
        x[1, 20] = ALL_BF16[bad]
        packed, scales = quantize_nvfp4(x, torch.tensor(0.01))
        expected_packed, expected_scales = clean_packed.clone(), clean_scales.view(torch.uint8).clone()
        expected_packed[1, 8:16] = 0
        expected_scales[1, 1] = 0x7F
        assert torch.equal(packed, expected_packed)
        assert torch.equal(scales.view(torch.uint8), expected_scales)
        for values in (dequantize_nvfp4(packed, scales), fake_quantize_nvfp4(x, torch.tensor(0.01))):
            nan = values.isnan()
            assert nan[1, 16:32].all()
            assert nan.sum() == 16

    def test_infinities_saturate_with_their_sign(self) -> None:
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 1], x[0, 2] = torch.inf, -torch.inf, 448.0
        values = dequantize_nvfp4(*quantize_nvfp4(x, torch.tensor(1.0)))
        assert values[0, :4].tolist() == [2688, -2688, 448, 0]

    def test_a_value_beyond_the_calibrated_range_saturates(self) -> None:
        x = torch.tensor([[5000.0, -4000.0, 1344.0] + [0.0] * 13])
        assert fake_quantize_nvfp4(x, torch.tensor(1.0))[0, :3].tolist() == [2688, -2688, 1344]

    def test_zero_keeps_its_sign_bit_like_the_conversion_instruction(self) -> None:
        x = torch.tensor([[6.0, 0.0, -0.0, 1e-9, -1e-9, 0.2, -0.2] + [0.0] * 9])
        packed, _ = quantize_nvfp4(x, torch.tensor(1.0))
        assert unpacked_codes(packed)[0, :7].tolist() == [7, 0, 8, 0, 8, 0, 8]

    def test_the_even_index_is_in_the_low_nibble(self) -> None:
        packed, _ = quantize_nvfp4(torch.tensor([[6.0, -1.0, 0.5, 3.0] + [0.0] * 12]), torch.tensor(1.0))
        assert packed[0, :2].tolist() == [0xA7, 0x51]

    def test_zero_rows_give_empty_tensors_of_the_right_width(self) -> None:
        packed, scales = quantize_nvfp4(torch.empty(0, 64, dtype=torch.bfloat16), torch.tensor(1.0))
        assert (packed.shape, packed.dtype) == ((0, 32), torch.uint8)
        assert (scales.shape, scales.dtype) == ((0, 4), torch.float8_e4m3fn)
        values = fake_quantize_nvfp4(torch.empty(0, 64), torch.tensor(1.0))
        assert (values.shape, values.dtype) == ((0, 64), torch.float32)
        values = dequantize_nvfp4(packed, scales, torch.tensor(1.0), dtype=torch.bfloat16)
        assert (values.shape, values.dtype) == ((0, 64), torch.bfloat16)

    @pytest.mark.parametrize("quantize", [quantize_nvfp4, fake_quantize_nvfp4])
    @pytest.mark.parametrize("columns", [8, 24, 1])
    def test_a_width_that_is_not_made_of_blocks_is_refused(self, quantize, columns: int) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(ValueError, match=rf"multiple of 16, got {columns}"):
            quantize(torch.zeros(2, columns), torch.tensor(1.0))


class TestProperties:
    @no_deadline
    @given(matrices(any_float32), scales_in_use)
    def test_fake_quantization_is_quantize_then_dequantize_bit_for_bit(self, x: Tensor, input_scale: Tensor) -> None:
        assert same_bits(fake_quantize_nvfp4(x, input_scale), dequantize_nvfp4(*quantize_nvfp4(x, input_scale)))

    @no_deadline
    @given(seeds, scales_in_use)
    def test_quantizing_what_was_dequantized_gives_the_same_codes(self, seed: int, input_scale: Tensor) -> None:
        x = gaussian(seed, 4, 64) * input_scale * 100
        packed, scales = quantize_nvfp4(x, input_scale)
        again_packed, again_scales = quantize_nvfp4(dequantize_nvfp4(packed, scales, input_scale), input_scale)
        # Below the normal numbers e4m3 is too coarse: the largest value of a block need not have code 6.
        normal = scales.float() >= SMALLEST_NORMAL_E4M3
        assert torch.equal(scales.float()[normal], again_scales.float()[normal])
        assert torch.equal(packed.view(4, 4, 8)[normal], again_packed.view(4, 4, 8)[normal])

    @no_deadline
    @given(seeds, scales_in_use)
    def test_the_error_is_at_most_half_the_spacing_of_e2m1_in_its_block(self, seed: int, input_scale: Tensor) -> None:
        x = gaussian(seed, 4, 64, spread=1.0) * input_scale * 100
        packed, scales = quantize_nvfp4(x, input_scale)
        error = (dequantize_nvfp4(packed, scales, input_scale) - x).double().abs().view(4, 4, 16)
        step = (scales.double() * input_scale.double()).unsqueeze(-1)
        y = x.double().abs().view(4, 4, 16) / step
        half_spacing = torch.where(y <= 2, 0.25, torch.where(y <= 4, 0.5, 1.0))
        usual = (scales.float() >= SMALLEST_NORMAL_E4M3) & (y.amax(-1) < 7)
        assert (error <= half_spacing * step * (1 + 1e-5))[usual].all()
        assert ((scales.double() * input_scale.double()) * 6 <= x.abs().view(4, 4, 16).amax(-1) * 17 / 16)[usual].all()

    @no_deadline
    @given(matrices(any_float32), scales_in_use)
    def test_rows_quantized_apart_or_together_give_the_same_bytes(self, x: Tensor, input_scale: Tensor) -> None:
        together = quantize_nvfp4(x, input_scale)
        apart = [quantize_nvfp4(row.unsqueeze(0), input_scale) for row in x]
        assert torch.equal(together[0], torch.cat([packed for packed, _ in apart]))
        assert torch.equal(together[1].view(torch.uint8), torch.cat([scales.view(torch.uint8) for _, scales in apart]))

    @no_deadline
    @given(arrays(np.uint8, (3, 16)))
    def test_packing_undoes_unpacking_for_any_bytes(self, codes: npt.NDArray[np.uint8]) -> None:
        packed = torch.from_numpy(codes.copy())
        packed[:, ::8] |= 7  # a magnitude of 6 in each block keeps the block scale at 1
        values = dequantize_nvfp4(packed, torch.ones(3, 2).to(torch.float8_e4m3fn))
        again, scales = quantize_nvfp4(values, torch.tensor(1.0))
        assert torch.equal(again, packed)
        assert (scales.float() == 1).all()


class TestDequantize:
    def test_every_byte_and_every_scale_give_their_exact_product_in_every_dtype(self) -> None:
        packed = torch.arange(256, dtype=torch.uint8).repeat(127, 1)  # [127, 256], one row for each scale
        scales = torch.arange(127, dtype=torch.uint8).unsqueeze(1).repeat(1, 32).view(torch.float8_e4m3fn)
        byte = np.arange(256)
        codes = np.stack([byte & 15, byte >> 4], axis=-1).reshape(-1)
        expected = np.append(E2M1_GRID, -E2M1_GRID)[codes] * E4M3_GRID[:, None]
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = dequantize_nvfp4(packed, scales, dtype=dtype)
            assert values.dtype == dtype
            np.testing.assert_array_equal(values.double().numpy(), expected)

    def test_the_global_scale_multiplies_in_fp32_before_the_cast(self) -> None:
        packed, scales = quantize_nvfp4(gaussian(5, 4, 64), torch.tensor(0.003))
        plain = dequantize_nvfp4(packed, scales)
        for global_scale in (torch.tensor(0.003), torch.rand(4, 1)):
            expected = plain * global_scale
            assert torch.equal(dequantize_nvfp4(packed, scales, global_scale), expected)
            assert torch.equal(
                dequantize_nvfp4(packed, scales, global_scale, dtype=torch.bfloat16), expected.bfloat16()
            )


class TestWeights:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_the_largest_weight_is_kept_and_the_others_are_near(self, dtype: torch.dtype) -> None:
        weight = gaussian(6, 96, 128, spread=0.5).to(dtype)
        packed, scales, weight_scale_2 = quantize_nvfp4_weight(weight)
        assert (packed.shape, scales.shape, weight_scale_2.shape) == ((96, 64), (96, 8), ())
        assert weight_scale_2.dtype == torch.float32
        restored = dequantize_nvfp4(packed, scales, weight_scale_2)
        assert scales.float().max() == 448
        torch.testing.assert_close(restored.abs().max(), weight.float().abs().max())
        relative = (restored - weight.float()).norm() / weight.float().norm()
        assert relative < 0.12  # about 0.09 is usual for e2m1 with blocks of 16

    def test_a_weight_of_zeros_stays_zeros(self) -> None:
        packed, scales, weight_scale_2 = quantize_nvfp4_weight(torch.zeros(4, 32))
        assert weight_scale_2 > 0
        assert not dequantize_nvfp4(packed, scales, weight_scale_2).any()

    def test_the_input_scale_maps_the_largest_value_to_6_times_448(self) -> None:
        amax = torch.tensor([2688.0, 1.0, 1e-3])
        torch.testing.assert_close(amax / input_scale_from_amax(amax), torch.full((3,), 2688.0))
        assert torch.isfinite(1 / input_scale_from_amax(torch.tensor(0.0)))


class TestSwizzle:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 300), st.integers(1, 11), seeds)
    def test_each_scale_lands_where_the_formula_says_and_the_rest_is_zero(
        self, rows: int, columns: int, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        scales = torch.randint(1, 256, (rows, columns), dtype=torch.uint8, generator=generator)
        swizzled = swizzle_scales(scales)
        expected = np.zeros(-(-rows // 128) * 128 * -(-columns // 4) * 4, dtype=np.uint8)
        for m in range(rows):
            for k in range(columns):
                tile = (m // 128) * -(-columns // 4) * 512 + (k // 4) * 512
                expected[tile + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4] = scales[m, k]
        assert swizzled.shape == (-(-rows // 128) * 128, -(-columns // 4) * 4)
        np.testing.assert_array_equal(swizzled.flatten().numpy(), expected)

    @no_deadline
    @given(st.integers(0, 300), st.integers(1, 30))
    def test_unswizzling_undoes_it_for_odd_sizes_too(self, rows: int, columns: int) -> None:
        scales = torch.rand(rows, columns).to(torch.float8_e4m3fn)
        restored = unswizzle_scales(swizzle_scales(scales), rows, columns)
        assert restored.dtype == torch.float8_e4m3fn
        assert torch.equal(restored.view(torch.uint8), scales.view(torch.uint8))
