"""Small checkpoints with random weights, made by transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nibble.kernels.torch.nvfp4 import quantize_nvfp4_weight

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}


DEEPSEEK = {
    **{name: value for name, value in COMMON.items() if name != "head_dim"},
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "first_k_dense_replace": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}


def save_qwen3(folder: Path, **overrides: object) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**{**COMMON, "tie_word_embeddings": False, **overrides}))
    return _save(model, folder)


def save_qwen3_moe(folder: Path, **overrides: object) -> Qwen3MoeForCausalLM:
    torch.manual_seed(2)
    moe = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True}
    config = Qwen3MoeConfig(**{**COMMON, "tie_word_embeddings": True, **moe, **overrides})
    return _save(Qwen3MoeForCausalLM(config), folder)


def save_deepseek_v3(folder: Path, **overrides: object) -> DeepseekV3ForCausalLM:
    return _save_deepseek(DeepseekV3ForCausalLM, DeepseekV3Config, folder, overrides)


def save_deepseek_v2(folder: Path, **overrides: object) -> DeepseekV2ForCausalLM:
    return _save_deepseek(DeepseekV2ForCausalLM, DeepseekV2Config, folder, overrides)


def _save_deepseek(
    model_class: type[PreTrainedModel], config_class: type[PretrainedConfig], folder: Path, overrides: dict[str, object]
) -> torch.nn.Module:
    torch.manual_seed(4)
    model = model_class(config_class(**{**DEEPSEEK, "tie_word_embeddings": False, **overrides}))
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("gate.weight") or name.endswith("e_score_correction_bias"):
                parameter.normal_(std=0.3)
    return _save(model, folder)


def _save(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):  # zeros otherwise
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model = model.eval()
    model.save_pretrained(folder)
    return model


def old_spelling(folder: Path) -> None:
    """Rewrites config.json with the field names of older transformers."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope["rope_theta"]
    config["rope_scaling"] = None
    config["torch_dtype"] = config.pop("dtype")
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrites model.safetensors after `edit` has changed its tensors by name."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def quantize_to_nvfp4(folder: Path) -> Path:
    """Quantizes a checkpoint in place, as irregularly as the format allows: every module has scales of its own."""
    generator = torch.Generator().manual_seed(3)

    def quantize(tensors: dict[str, Tensor]) -> None:
        for module in [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]:
            weight, weight_scale, weight_scale_2 = quantize_nvfp4_weight(tensors[f"{module}.weight"])
            tensors |= {
                f"{module}.weight": weight,
                f"{module}.weight_scale": weight_scale,
                f"{module}.weight_scale_2": weight_scale_2,
                # As if calibrated on activations of up to 4 to 8.
                f"{module}.input_scale": (4 + 4 * torch.rand((), generator=generator)) / 2688,
            }

    edit_tensors(folder, quantize)
    excluded = ["lm_head", "model.layers.*.mlp.gate"]
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": excluded}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return folder
