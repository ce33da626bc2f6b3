"""FP8 rows in torch, the reference: checked against all e4m3 numbers there are, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fp8_row_cases as cases
from nibble.kernels.torch.fp8_row import (
    GROUP_SIZE,
    Fp8RowLayout,
    dequantize_fp8_rows,
    leave_result,
    quantize_fp8_rows,
    sum_fp8_rows,
)

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = E4M3[E4M3.isfinite()].unique()


def round_trip(x: Tensor) -> Tensor:
    return dequantize_fp8_rows(quantize_fp8_rows(x), x.shape[1])


def test_a_row_of_deepseek_r1_takes_about_half_the_bytes_of_bf16() -> None:
    layout = Fp8RowLayout(7168)
    assert (layout.num_groups, layout.scale_offset, layout.row_bytes) == (56, 7168, 7392)
    assert layout.row_bytes < 0.52 * 2 * 7168


@pytest.mark.parametrize("hidden_size", [1, 3, 16, 127, 129, 7168])
def test_scales_are_words_and_rows_are_whole_lines_of_16_bytes(hidden_size: int) -> None:
    layout = Fp8RowLayout(hidden_size)
    assert layout.scale_offset % 4 == 0 and layout.scale_offset >= hidden_size
    assert layout.row_bytes % 16 == 0 and layout.row_bytes >= layout.scale_offset + 4 * layout.num_groups


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from([1, 5, 128, 200]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_value_is_the_nearest_e4m3_number_times_the_smallest_power_of_two_that_holds_its_group(
    seed: int, hidden_size: int, dtype: torch.dtype
) -> None:
    x = cases.values(seed, 4, hidden_size, dtype)
    result = round_trip(x).double()
    for group, ours in zip(x.double().split(GROUP_SIZE, dim=1), result.split(GROUP_SIZE, dim=1), strict=True):
        ratio = (group.abs().amax(1, keepdim=True) / 448).clamp_min(2.0**-126)
        scale = 2.0 ** ratio.log2().ceil()
        distance = (group[..., None] / scale[..., None] - NUMBERS).abs().amin(-1)
        assert torch.equal((group - ours).abs(), distance * scale)


def test_ties_go_to_the_even_number() -> None:
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]])
    assert round_trip(x).tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8]]


@pytest.mark.parametrize("exponent", [-117, -40, 0, 119])
def test_e4m3_numbers_times_a_power_of_two_come_back_as_they_are(exponent: int) -> None:
    x = (NUMBERS * 2.0**exponent).float()[None]
    assert torch.equal(round_trip(x), x)


def test_what_is_not_finite_spoils_its_own_group_and_nothing_else() -> None:
    x = cases.values(0, 6, 300)
    result, clean = round_trip(cases.spoiled(x)), round_trip(x)
    for row in range(3):
        assert result[row, :GROUP_SIZE].isnan().all()
        assert torch.equal(result[row, GROUP_SIZE:], clean[row, GROUP_SIZE:])
    assert torch.equal(result[3:], clean[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_adds_in_fp32_in_the_order_of_the_ranks_and_rounds_once(dtype: torch.dtype) -> None:
    terms = [cases.values(seed, 5, 200) for seed in range(4)]
    terms[-1] = -terms[0]  # what is left depends on the bits that were lost on the way, so on the order
    rows = torch.cat([quantize_fp8_rows(term) for term in terms])
    total = round_trip(terms[0])
    for term in terms[1:]:
        total = total + round_trip(term)
    assert torch.equal(sum_fp8_rows(rows, 4, 200, dtype), total.to(dtype))


def test_no_rows_give_no_rows() -> None:
    rows = quantize_fp8_rows(torch.empty(0, 200))
    assert rows.shape == (0, Fp8RowLayout(200).row_bytes)
    assert sum_fp8_rows(rows, 4, 200, torch.bfloat16).shape == (0, 200)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of 32 bytes do not fit the layout of 48 bytes \(hidden_size 40\)"):
        dequantize_fp8_rows(torch.zeros(1, 32, dtype=torch.uint8), 40)


def test_a_result_is_left_in_the_format_of_the_memory_that_is_to_hold_it() -> None:
    result = cases.values(1, 3, 144)
    out = torch.empty(3, 144, dtype=torch.bfloat16)
    assert torch.equal(leave_result(result, out), result.bfloat16())
    rows = torch.empty(3, Fp8RowLayout(144).row_bytes, dtype=torch.uint8)
    cases.assert_same_rows(leave_result(result, rows), quantize_fp8_rows(result), 144)
