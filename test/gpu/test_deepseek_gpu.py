"""DeepSeek on a GPU, with latent attention through Triton and torch; test_flashinfer_mla.py has FlashInfer's."""

from pathlib import Path

import pytest

import deepseek_cases as cases

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]  # its norms


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_latent_attention_gives_the_logits_of_the_cpu(tmp_path: Path, backend: str) -> None:
    cases.assert_logits_of_the_cpu(tmp_path, backend)


def test_a_cuda_graph_is_bit_equal_to_the_kernels_that_it_captured(tmp_path: Path) -> None:
    cases.assert_a_graph_is_bit_equal_to_its_kernels(tmp_path, "triton")
