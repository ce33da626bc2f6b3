"""FP8 rows in Triton, compiled: with the GPU's own conversions the same bits as in torch."""

import pytest
import torch

import fp8_row_cases as cases
from nibble.kernels.torch import fp8_row as reference
from nibble.kernels.triton.fp8_row import quantize_fp8_rows, sum_fp8_rows

pytestmark = pytest.mark.gpu

HIDDEN_SIZES = (*cases.HIDDEN_SIZES, 7168)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
def test_rows_are_those_of_torch(hidden_size: int, dtype: torch.dtype) -> None:
    cases.assert_quantizes_like_torch(cases.values(0, 50, hidden_size, dtype), "cuda")
    cases.assert_quantizes_like_torch(cases.spoiled(cases.values(1, 6, hidden_size, dtype)), "cuda")


def test_every_number_and_what_is_at_and_beside_every_tie_is_rounded_as_in_torch() -> None:
    cases.assert_quantizes_like_torch(cases.near_ties(), "cuda")


@pytest.mark.parametrize("hidden_size", HIDDEN_SIZES)
@pytest.mark.parametrize("num_terms", [1, 3, 8])
def test_sums_are_those_of_torch(hidden_size: int, num_terms: int) -> None:
    terms = [cases.values(seed, 20, hidden_size) for seed in range(num_terms)]
    cases.assert_sums_like_torch(terms, "cuda")
    rows = torch.cat([reference.quantize_fp8_rows(term) for term in terms])
    arguments = num_terms, hidden_size, torch.bfloat16
    assert torch.equal(sum_fp8_rows(rows.cuda(), *arguments).cpu(), reference.sum_fp8_rows(rows, *arguments))


def test_a_captured_graph_computes_what_its_inputs_hold_when_it_is_replayed() -> None:
    x = cases.values(0, 6, 7168).cuda()

    def round_trip() -> torch.Tensor:
        return sum_fp8_rows(quantize_fp8_rows(x), 2, 7168, torch.bfloat16)

    round_trip()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = round_trip()
    for seed in (1, 2):
        new = cases.values(seed, 6, 7168)
        x.copy_(new)
        graph.replay()
        expected = reference.sum_fp8_rows(reference.quantize_fp8_rows(new), 2, 7168, torch.bfloat16)
        assert torch.equal(result.cpu(), expected)
