"""The kernels of a layer that are not about experts, compiled, against fp64."""

import pytest
import torch

import layer_kernel_cases as cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 4, 128), (4, 2, 64), (3, 1, 96)])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_heads_are_normalized_and_rotated_as_in_fp64(rows, heads, kv_heads, size):
    cases.check_qk_norm_rope(rows, heads, kv_heads, size, "cuda")


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(24, 4), (128, 8), (256, 8)])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_the_router_chooses_the_experts_that_torch_chooses(rows, experts, top_k, renormalize):
    cases.check_topk_softmax(rows, experts, top_k, renormalize, "cuda")


def test_of_equal_experts_the_lower_ones_are_chosen():
    cases.check_topk_softmax_of_equal_logits("cuda")


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("is_biased", [False, True])
@pytest.mark.parametrize("shape", [(16, 4, 2, 4), (12, 3, 1, 3), (8, 1, 1, 3), (256, 8, 4, 8)])
@pytest.mark.parametrize("rows", [0, 1, 300])
def test_the_router_chooses_the_groups_and_experts_that_torch_chooses(rows, shape, is_biased, renormalize):
    cases.check_grouped_topk(rows, shape, is_biased, renormalize, "cuda")


def test_of_equal_groups_and_experts_the_lower_ones_are_chosen():
    cases.check_grouped_topk_of_equal_logits("cuda")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "rank", "size"), [(128, 512, 64), (4, 64, 16), (3, 20, 12)])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_latent_vectors_are_copied_and_the_parts_behind_them_rotated_as_in_fp64(rows, heads, rank, size, interleaved):
    cases.check_rope_latent(rows, heads, rank, size, interleaved, "cuda")


@pytest.mark.parametrize(("heads", "size"), [(4, 128), (2, 64), (3, 24)])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_keys_and_values_go_to_their_slots_and_nowhere_else(rows, heads, size):
    cases.check_store_kv(rows, heads, size, torch.bfloat16, "cuda")
