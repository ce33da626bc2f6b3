"""What several end-to-end tests start from."""

import sys
from pathlib import Path

import pytest
from hypothesis import settings

from server_process import DEMO_MODEL

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model.dequantize import dequantize_checkpoint

settings.register_profile("long", max_examples=3000)


@pytest.fixture(scope="session")
def bf16_checkpoint(tmp_path_factory) -> Path:
    """Unquantized and computed in fp32: no FP4 rounding that could turn the last bit into another token."""
    folder = tmp_path_factory.mktemp("bf16")
    dequantize_checkpoint(DEMO_MODEL, folder)
    return folder
