"""Routing to experts in groups, against the papers' definitions written out in Python numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.kernels.torch.topk import grouped_topk, topk_softmax


def reference(
    logits: list[float], bias: list[float] | None, top_k: int, n_group: int, topk_group: int, renormalize: bool
) -> dict[int, float]:
    """Expert -> weight before scaling, of one token."""
    if bias is None:
        exponentials = [math.exp(x) for x in logits]
        scores = [x / sum(exponentials) for x in exponentials]
        choice = scores
    else:
        scores = [1 / (1 + math.exp(-x)) for x in logits]
        choice = [score + b for score, b in zip(scores, bias, strict=True)]
    size = len(logits) // n_group
    groups = [range(first, first + size) for first in range(0, len(logits), size)]
    counted = 1 if bias is None else 2

    def quality(group: range) -> float:
        return sum(sorted((choice[expert] for expert in group), reverse=True)[:counted])

    allowed = [expert for group in sorted(groups, key=quality, reverse=True)[:topk_group] for expert in group]
    chosen = sorted(allowed, key=lambda expert: choice[expert], reverse=True)[:top_k]
    total = sum(scores[expert] for expert in chosen) if renormalize else 1.0
    return {expert: scores[expert] / total for expert in chosen}


@pytest.mark.parametrize("is_biased", [True, False])
@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(8, 1, 1, 3), (12, 4, 2, 4), (16, 4, 1, 4), (16, 8, 4, 8), (6, 6, 2, 2), (256, 8, 4, 8)]),
    renormalize=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_experts_and_weights_are_those_of_the_definition(is_biased, shape, renormalize, seed):
    experts, n_group, topk_group, top_k = shape
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, experts, generator=generator)
    bias = torch.randn(experts, generator=generator) if is_biased else None
    ids, weights = grouped_topk(logits, bias, top_k, n_group, topk_group, renormalize, 2.5)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    for row in range(5):
        expected = reference(
            logits[row].tolist(), None if bias is None else bias.tolist(), top_k, n_group, topk_group, renormalize
        )
        ours = dict(zip(ids[row].tolist(), weights[row].tolist(), strict=True))
        assert ours == pytest.approx({expert: 2.5 * weight for expert, weight in expected.items()}, rel=1e-5)


def test_one_group_without_bias_is_the_plain_choice():
    logits = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    for ours, plain in zip(grouped_topk(logits, None, 4, 1, 1, True, 1.0), topk_softmax(logits, 4, True), strict=True):
        torch.testing.assert_close(ours, plain)


def test_the_bias_decides_who_is_chosen_and_not_how_much_they_weigh():
    logits = torch.zeros(1, 4)
    ids, weights = grouped_topk(logits, torch.tensor([0.0, 3.0, 0.0, 2.0]), 2, 1, 1, False, 1.0)
    assert ids.tolist() == [[1, 3]]
    assert weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("bias", [None, torch.zeros(8)])
def test_no_rows_choose_nothing(bias):
    ids, weights = grouped_topk(torch.empty(0, 8), bias, 2, 4, 2, True, 1.0)
    assert ids.shape == weights.shape == (0, 2)
