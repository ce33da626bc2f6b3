"""Configurations of small checkpoints, and what becomes of them."""

from pathlib import Path

import pytest

from nibble.config.resolve import EngineConfig, resolve
from nibble.config.server_args import ServerArgs
from nibble.utils.capability import Capability
from nibble.utils.errors import ConfigError

MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "eos_token_id": 2,
}
DENSE = {
    **{name: value for name, value in MOE.items() if "expert" not in name and not name.startswith("moe")},
    "architectures": ["Qwen3ForCausalLM"],
}
NVFP4 = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head"]}
EMBEDDED = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 16}}},
}
DP2 = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True, "enable_flashinfer_cutlass_moe": True}
TWO_RANKS = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}


def resolved(folder: Path, **args: object) -> EngineConfig:
    return resolve(ServerArgs(model_path=str(folder), **args))


def refused(folder: Path, **args: object) -> str:
    with pytest.raises(ConfigError) as error:
        resolved(folder, **args)
    return str(error.value)


def machine(
    num_gpus: int = 1, arch: tuple[int, int] = (9, 0), has_triton: bool = True, has_flashinfer: bool = False
) -> Capability:
    return Capability((0, 1), num_gpus, arch if num_gpus else None, has_triton, has_flashinfer, has_flashinfer)


def on_a_gpu(monkeypatch, **found) -> None:
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: machine(has_flashinfer=True, **found))
