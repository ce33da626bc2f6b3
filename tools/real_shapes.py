"""Makes a folder that serves like DeepSeek-R1 in NVFP4, cut to a few layers, with `--load-format dummy`.

    python -m tools.real_shapes --output build/deepseek-r1-4-layers --layers 4
    python -m nibble.launch_server --model-path build/deepseek-r1-4-layers --load-format dummy …

Every layer has the published sizes; only their number is smaller: by default one dense layer and the rest with experts.
A layer with experts takes 6.4 GB in NVFP4, over all ranks. There are no weights in the folder, and its tokenizer is the
demo model's, so answers are noise: this is for memory, speed and what runs at all.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[1] / "assets" / "nibble-demo-6m-nvfp4"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# https://huggingface.co/deepseek-ai/DeepSeek-R1/blob/main/config.json
DEEPSEEK_R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def write_checkpoint(folder: Path, layers: int, dense_layers: int, quantize_attention: bool) -> None:
    """Writes configuration and tokenizer. Raises ValueError where `layers` has no room for `dense_layers`."""
    if not 0 <= dense_layers <= layers:
        raise ValueError(f"--dense-layers {dense_layers} must be between 0 and --layers {layers}")
    config = DEEPSEEK_R1 | {
        "num_hidden_layers": layers,
        "first_k_dense_replace": dense_layers,
        "num_nextn_predict_layers": 0,
    }
    excluded = ["lm_head", "model.layers.*.mlp.gate"]
    if not quantize_attention:
        excluded.append("model.layers.*.self_attn*")
    quantization = {
        "producer": {"name": "modelopt"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": excluded,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "hf_quant_config.json").write_text(json.dumps(quantization, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copyfile(TOKENIZER / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--layers", type=int, default=4, help="layers in all (R1: 61)")
    parser.add_argument("--dense-layers", type=int, default=1, help="how many of them have no experts (R1: 3)")
    parser.add_argument("--quantize-attention", action="store_true", help="NVFP4 in attention, too; otherwise BF16")
    args = parser.parse_args()
    try:
        write_checkpoint(args.output, args.layers, args.dense_layers, args.quantize_attention)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
