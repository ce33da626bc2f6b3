"""FP8 rows in Triton, interpreted, where they do without the GPU's conversions; compiled in test/gpu."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import fp8_row_cases as cases
from nibble.kernels.triton.fp8_row import quantize_fp8_rows, sum_fp8_rows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", cases.HIDDEN_SIZES)
def test_rows_are_those_of_torch(hidden_size: int, dtype: torch.dtype) -> None:
    cases.assert_quantizes_like_torch(cases.values(0, 6, hidden_size, dtype), "cpu")
    cases.assert_quantizes_like_torch(cases.spoiled(cases.values(1, 6, hidden_size, dtype)), "cpu")


def test_every_number_and_what_is_at_and_beside_every_tie_is_rounded_as_in_torch() -> None:
    cases.assert_quantizes_like_torch(cases.near_ties(), "cpu")


@pytest.mark.parametrize("hidden_size", cases.HIDDEN_SIZES)
@pytest.mark.parametrize("num_terms", [1, 3])
def test_sums_are_those_of_torch(hidden_size: int, num_terms: int) -> None:
    cases.assert_sums_like_torch([cases.values(seed, 3, hidden_size) for seed in range(num_terms)], "cpu")


def test_no_rows_give_no_rows() -> None:
    rows = quantize_fp8_rows(torch.empty(0, 128))
    assert rows.shape == (0, 144)
    assert sum_fp8_rows(rows, 2, 128, torch.float32).shape == (0, 128)
