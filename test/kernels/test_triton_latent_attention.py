"""Latent attention of decoding steps, interpreted: that of PyTorch, however a sequence is split and its pages lie.

Where there is a GPU, test/gpu/test_latent_attention_gpu.py runs the kernels compiled instead.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import latent_attention_cases as cases
from nibble.kernels.triton import latent_attention
from nibble.layers.attention.torch_backend import TorchAttentionStep

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")

FP32 = torch.float32


@pytest.mark.parametrize("heads", [1, 16, 19])
@pytest.mark.parametrize("seq_lens", [[1], [33], [1, 5, 64, 97]], ids=str)
def test_every_head_attends_to_the_tokens_of_its_sequence_and_no_others(seq_lens: list[int], heads: int) -> None:
    cases.check_decode(seq_lens, heads, rank=32, rope=16, page_size=4, dtype=FP32, device="cpu")


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 10).map(lambda half: 2 * half),
    st.integers(1, 5),
)
def test_any_shape_gives_what_torch_gives(
    seq_lens: list[int], heads: int, rank: int, rope: int, page_size: int
) -> None:
    cases.check_decode(seq_lens, heads, rank, rope, page_size, FP32, "cpu")


@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_the_number_of_splits_does_not_matter(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_attention, "num_multiprocessors", lambda device: programs)
    cases.check_decode([7, 150], 4, rank=16, rope=16, page_size=16, dtype=FP32, device="cpu")


def test_a_graphs_step_follows_its_plan_from_batch_to_batch() -> None:
    """Lengths, pages and slots of the capture must not stay behind."""
    ours, theirs = cases.backends(16, 16, 4, 40, FP32, "cpu")
    step = ours.graph_step(2, 40)
    for seed, seq_lens in enumerate([[1, 1], [40, 3], [2, 77]]):
        batch = cases.batch_of(seq_lens, 4, 40, seed)
        qkv = cases.random_qkv(2, 4, 16, 16, FP32, "cpu", seed)
        step.plan(batch)
        torch.testing.assert_close(step.forward(0, *qkv), theirs.plan(batch).forward(0, *qkv))


def test_steps_with_prompts_are_left_to_torch() -> None:
    ours, _ = cases.backends(16, 16, 4, 40, FP32, "cpu")
    batch = cases.batch_of([3, 5], 4, 40)
    assert isinstance(ours.plan(cases.AttentionBatch([1, 2], [3, 5], batch.page_tables)), TorchAttentionStep)
