"""Latent attention through FlashInfer: its results, in DeepSeek's layers and in graphs, and that no launch waits.

Its kernel waits until it has all multiprocessors: beside kernels that wait for each other, for ever. So all that use it
are here, and have the GPU alone.
"""

from pathlib import Path

import pytest

import attention_cases
import deepseek_cases
import launch_cases
from attention_cases import Shape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu_alone")]

SHAPES = [Shape(16, 1, 576, 512), Shape(128, 1, 576, 512)]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", attention_cases.BATCHES)
def test_attention_is_that_of_torch(name: str, shape: Shape, page_size: int) -> None:
    attention_cases.assert_like_torch(name, shape, page_size)


def test_a_captured_step_follows_its_plan() -> None:
    attention_cases.assert_a_captured_step_follows_its_plan(SHAPES[-1])


def test_deepseek_gives_the_logits_of_the_cpu(tmp_path: Path) -> None:
    deepseek_cases.assert_logits_of_the_cpu(tmp_path, "flashinfer")


def test_a_cuda_graph_of_deepseek_is_bit_equal_to_the_kernels_that_it_captured(tmp_path: Path) -> None:
    deepseek_cases.assert_a_graph_is_bit_equal_to_its_kernels(tmp_path, "flashinfer")


def test_no_launch_waits_for_what_the_gpu_has_still_to_do(tmp_path: Path) -> None:
    runner = deepseek_cases.make_quantized_runner(tmp_path, "flashinfer")
    launch_cases.assert_no_launch_waits_for_what_the_gpu_has_still_to_do(runner)
