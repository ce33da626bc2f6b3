"""The DeepSeek-R1 configuration that tools/real_shapes.py writes."""

import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT), str(ROOT / "test" / "models")]

from tools.real_shapes import DEEPSEEK_R1, write_checkpoint  # noqa: E402

from nibble.config.model_config import load_model_config  # noqa: E402
from nibble.distributed.communicator import SingleRankCommunicator  # noqa: E402
from nibble.layers.weights import WeightTarget  # noqa: E402
from nibble.models.registry import create_model  # noqa: E402
from runners import data_parallel_state, engine_config  # noqa: E402


def weights_of(folder: Path) -> dict[str, WeightTarget]:
    """What one rank would load, without memory for it."""
    config = engine_config(folder, load_format="dummy", cpu_kernels="torch")
    with torch.device("meta"):
        model = create_model(config, data_parallel_state(SingleRankCommunicator("tp")))
    targets = {
        name: target for prefix, layer in model.layers() for name, target in layer.weight_targets(prefix).items()
    }
    return {name: target for name, target in targets.items() if target is not None}


def test_with_all_its_layers_it_would_be_the_published_model(tmp_path):
    """671 billion parameters, as the model card says (685 with the layer that guesses a further token)."""
    write_checkpoint(tmp_path, layers=2, dense_layers=1, quantize_attention=True)
    totals = {"model.layers.0.": 0, "model.layers.1.": 0, "": 0}
    for name, target in weights_of(tmp_path).items():
        if not name.endswith(("_scale", "_scale_2")):
            values = math.prod(target.shape) * (2 if torch.uint8 in target.dtypes else 1)
            totals[next(prefix for prefix in totals if name.startswith(prefix))] += values
    dense, with_experts, rest = totals.values()
    layers, dense_layers = DEEPSEEK_R1["num_hidden_layers"], DEEPSEEK_R1["first_k_dense_replace"]
    total = rest + dense_layers * dense + (layers - dense_layers) * with_experts
    assert total == pytest.approx(671.03e9, rel=1e-4)


def test_a_layer_with_experts_takes_the_memory_that_the_tool_says(tmp_path):
    write_checkpoint(tmp_path, layers=2, dense_layers=1, quantize_attention=False)
    sizes = {
        name: math.prod(target.shape) * target.dtypes[0].itemsize
        for name, target in weights_of(tmp_path).items()
        if name.startswith("model.layers.1.mlp.")
    }
    assert sum(sizes.values()) == pytest.approx(6.4e9, rel=0.01)


def test_only_the_number_of_layers_differs(tmp_path):
    write_checkpoint(tmp_path, layers=4, dense_layers=1, quantize_attention=False)
    model = load_model_config(tmp_path)
    assert [layer for layer in range(model.num_layers) if not model.moe.is_moe_layer(layer)] == [0]
    assert (model.hidden_size, model.moe.num_experts, model.kv_elements_per_token) == (7168, 256, 4 * 576)
    quantized = {name for name, target in weights_of(tmp_path).items() if torch.uint8 in target.dtypes}
    assert not any("self_attn" in name or name.endswith("gate.weight") for name in quantized)
    assert "model.layers.0.mlp.down_proj.weight" in quantized
    assert "model.layers.3.mlp.shared_experts.down_proj.weight" in quantized
    assert DEEPSEEK_R1["num_hidden_layers"] == 61


def test_more_dense_layers_than_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--dense-layers 3 must be between 0 and --layers 2"):
        write_checkpoint(tmp_path, layers=2, dense_layers=3, quantize_attention=False)
