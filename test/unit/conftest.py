"""What tests of several files take."""

import json
from pathlib import Path

import pytest

from config_cases import MOE


@pytest.fixture
def checkpoint(tmp_path):
    def write(config: dict | None = None, quantization: dict | None = None, **changes: object) -> Path:
        content = {**(config or MOE), **changes}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        if quantization is not None:
            (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
        return tmp_path

    return write
