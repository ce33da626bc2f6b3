"""DeepSeek's config.json, as it is published and as newer transformers write it."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))
from tools.real_shapes import DEEPSEEK_R1 as R1

from nibble.config.model_config import GroupedRouting, MlaConfig, ModelConfig, load_model_config
from nibble.config.resolve import resolve
from nibble.config.server_args import ServerArgs
from nibble.utils.capability import Capability
from nibble.utils.errors import ConfigError

V2 = {
    **R1,
    "architectures": ["DeepseekV2ForCausalLM"],
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}


def load(folder: Path, config: dict[str, object], **changes: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return load_model_config(folder)


def test_the_published_config_of_r1(tmp_path):
    model = load(tmp_path, R1)
    assert model.mla == MlaConfig(1536, 512, 128, 64, 128, rope_interleave=True)
    assert model.kv_elements_per_token == 61 * 576
    assert (model.head_dim, model.rotary_dim, model.num_nextn_predict_layers) == (192, 64, 1)
    # 0.1 * ln(40) + 1 = 1.3689, squared; cosines and sines keep their size.
    assert model.softmax_scale == pytest.approx(192**-0.5 * 1.3688879**2)
    assert model.rope_scaling.attention_factor == 1.0
    assert model.moe.routing == GroupedRouting("sigmoid", 8, 4, 2.5)
    assert model.moe.shared_intermediate_size == 2048
    assert [layer for layer in range(61) if not model.moe.is_moe_layer(layer)] == [0, 1, 2]


def test_the_spelling_of_newer_transformers_means_the_same(tmp_path):
    renamed = {name: value for name, value in R1.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    for name in ("scoring_func", "topk_method", "moe_layer_freq"):
        del renamed[name]
    scaling = {name: value for name, value in R1["rope_scaling"].items() if name != "type"}
    renamed |= {
        "rope_parameters": {**scaling, "rope_type": "yarn", "rope_theta": 10000.0},
        "dtype": "bfloat16",
        "rope_interleave": True,
        "head_dim": 64,
    }
    assert load(tmp_path, renamed) == load(tmp_path, R1)


def test_v2_routes_by_softmax_and_only_some_of_its_checkpoints_limit_groups(tmp_path):
    assert load(tmp_path, V2).moe.routing == GroupedRouting("softmax", 8, 3, 16.0)
    greedy = load(tmp_path, V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0)
    assert greedy.moe.routing == GroupedRouting("softmax", 1, 1, 1.0)


def test_every_so_many_layers_may_have_experts(tmp_path):
    moe = load(tmp_path, R1, num_hidden_layers=8, first_k_dense_replace=1, moe_layer_freq=2).moe
    assert [layer for layer in range(8) if moe.is_moe_layer(layer)] == [2, 4, 6]


def test_a_model_of_the_family_without_experts_is_dense(tmp_path):
    assert load(tmp_path, R1, n_routed_experts=None).moe is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' and topk_method 'noaux_tc' is not supported"),
        ({"topk_method": "random"}, "topk_method 'random' is not supported"),
        ({"n_group": 7}, "n_group 7 groups of 256 experts"),
        ({"topk_group": 9}, "from topk_group 9 of n_group 8"),
        ({"n_group": 256, "topk_group": 4}, "8 experts cannot be chosen from topk_group 4"),
        ({"v_head_dim": None}, "has no field 'v_head_dim'"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "has no field 'original_max_position_embeddings'"),
    ],
)
def test_what_the_family_does_not_do_is_refused_by_name(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path, R1, **changes)


def test_renormalized_softmax_weights_are_refused(tmp_path):
    """DeepSeek's own code does not scale them then, others do; no published checkpoint has them."""
    with pytest.raises(ConfigError, match="norm_topk_prob with scoring_func 'softmax'"):
        load(tmp_path, V2, norm_topk_prob=True)


@pytest.mark.parametrize(
    ("changes", "gpus", "backend", "reason"),
    [
        ({}, 2, "flashinfer", ""),
        ({"kv_lora_rank": 256}, 2, "triton", "have (256, 64) values, and FlashInfer's (512, 64)"),
        ({}, 1, "triton", "its kernel of latent attention hangs where ranks share a GPU"),
    ],
)
def test_flashinfers_latent_attention_is_chosen_where_it_has_a_kernel_that_runs(
    tmp_path, monkeypatch, changes, gpus, backend, reason
):
    """Programs of one of its launches wait for each other: of two ranks' launches neither found room, and both hung."""
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: Capability((0, 1), gpus, (9, 0), True, True, True))
    load(tmp_path, R1, **changes)
    args = ServerArgs(
        model_path=str(tmp_path), load_format="dummy", tp_size=2, dp_size=2, ep_size=2, enable_dp_attention=True
    )
    config = resolve(args)
    assert config.attention_backend == backend
    assert reason in " ".join(config.decisions())
    if backend == "triton":
        with pytest.raises(ConfigError, match=re.escape(f"--attention-backend flashinfer: {config.no_flashinfer}")):
            resolve(replace(args, attention_backend="flashinfer"))
