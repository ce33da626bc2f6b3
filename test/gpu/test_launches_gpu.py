"""No launch of a step waits for the GPU: where steps overlap, the host would be as late as without."""

from pathlib import Path

import pytest

import launch_cases as cases
from deepseek_cases import make_quantized_runner

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]


def test_no_launch_waits_for_what_the_gpu_has_still_to_do(tmp_path: Path) -> None:
    cases.assert_no_launch_waits_for_what_the_gpu_has_still_to_do(cases.make_demo_runner(tmp_path))


def test_no_launch_waits_with_latent_attention_through_triton(tmp_path: Path) -> None:
    runner = make_quantized_runner(tmp_path, "triton")
    cases.assert_no_launch_waits_for_what_the_gpu_has_still_to_do(runner)
