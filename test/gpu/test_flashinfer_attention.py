"""FlashInfer's attention gives what torch's gives, on caches of any page size, for decoding, prompts and both."""

import pytest

import attention_cases as cases
from attention_cases import Shape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]

SHAPES = [Shape(32, 4, 128), Shape(4, 2, 64), Shape(8, 8, 64)]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", cases.BATCHES)
def test_attention_is_that_of_torch(name: str, shape: Shape, page_size: int) -> None:
    cases.assert_like_torch(name, shape, page_size)


def test_a_captured_step_follows_its_plan() -> None:
    cases.assert_a_captured_step_follows_its_plan(SHAPES[0])
