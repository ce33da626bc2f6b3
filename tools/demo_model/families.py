"""The architectures that the demo model is trained in: their sizes, and how transformers builds them."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import AutoModelForCausalLM, DeepseekV3Config, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from .tokenizer import MAX_LENGTH, VOCAB_SIZE


@dataclass(frozen=True)
class Family:
    checkpoint: str
    """Its checkpoints are assets/CHECKPOINT-nvfp4, and the record of the BF16 original assets/CHECKPOINT-bf16.json."""
    config: Callable[[], PretrainedConfig]
    max_bytes: int
    """Of the NVFP4 checkpoint."""


def qwen3_config() -> Qwen3MoeConfig:
    """5.8 M parameters, of which a token uses 1.6 M besides the embedding."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,  # of dense layers, of which there are none
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=24,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=MAX_LENGTH,
    )


def deepseek_config() -> DeepseekV3Config:
    """3.5 M parameters, of which a token uses 1.6 M besides the embedding; everything that R1 has, but small."""
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=48,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": MAX_LENGTH // 4,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        max_position_embeddings=MAX_LENGTH,
    )


FAMILIES = {
    "qwen3": Family("nibble-demo-6m", qwen3_config, max_bytes=4_500_000),
    "deepseek": Family("nibble-demo-deepseek-3m", deepseek_config, max_bytes=2_500_000),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a checkpoint."""
    return next(family for family in FAMILIES.values() if isinstance(config, type(family.config())))


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config)
