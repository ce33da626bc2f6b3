"""The Triton twins of a layer's small kernels, interpreted.

Where there is a GPU, test/gpu/test_layer_kernels_gpu.py runs them compiled instead.
"""

import pytest
import torch

import layer_kernel_cases as cases

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 64), (3, 1, 96), (2, 2, 16)])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_heads_are_normalized_and_rotated_as_in_fp64(rows: int, heads: int, kv_heads: int, size: int) -> None:
    cases.check_qk_norm_rope(rows, heads, kv_heads, size)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (24, 4), (128, 8), (200, 6)])
@pytest.mark.parametrize("rows", [0, 2])
def test_the_router_chooses_the_experts_that_torch_chooses(
    rows: int, experts: int, top_k: int, renormalize: bool
) -> None:
    cases.check_topk_softmax(rows, experts, top_k, renormalize)


def test_of_equal_experts_the_lower_ones_are_chosen() -> None:
    cases.check_topk_softmax_of_equal_logits()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("shape", [(16, 4, 2, 4), (12, 3, 1, 3), (6, 6, 2, 2), (8, 1, 1, 3), (256, 8, 4, 8)])
@pytest.mark.parametrize("rows", [0, 3])
def test_the_router_chooses_the_groups_and_experts_that_torch_chooses(
    rows: int, shape: tuple[int, int, int, int], is_biased: bool, renormalize: bool
) -> None:
    cases.check_grouped_topk(rows, shape, is_biased, renormalize)


def test_of_equal_groups_and_experts_the_lower_ones_are_chosen() -> None:
    cases.check_grouped_topk_of_equal_logits()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "rank", "size"), [(2, 64, 16), (3, 20, 12)])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_latent_vectors_are_copied_and_the_parts_behind_them_rotated_as_in_fp64(
    rows: int, heads: int, rank: int, size: int, interleaved: bool
) -> None:
    cases.check_rope_latent(rows, heads, rank, size, interleaved)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "size"), [(2, 64), (3, 24)])
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_keys_and_values_go_to_their_slots_and_nowhere_else(
    rows: int, heads: int, size: int, cache_dtype: torch.dtype
) -> None:
    cases.check_store_kv(rows, heads, size, cache_dtype)
