"""What a checkpoint's config.json says, in one form for old and new spellings."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble.utils.errors import ConfigError


@dataclass(frozen=True)
class GroupedRouting:
    """Experts lie in `n_group` groups, and a token chooses from its `topk_group` best groups (DeepSeek).

    `scoring_func` "sigmoid" comes with a correction bias that counts in the choice but not in the weights
    (arXiv:2408.15664), and ranks groups by their two best experts; "softmax" ranks them by the best one.
    """

    scoring_func: str
    n_group: int
    topk_group: int
    routed_scaling_factor: float


@dataclass(frozen=True)
class MoeConfig:
    """Routing and shape of the mixture-of-experts layers."""

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]
    routing: GroupedRouting | None
    """None: the `top_k` largest of the softmax."""
    shared_intermediate_size: int
    """Of the expert that every token uses; 0 without one."""

    def is_moe_layer(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (arXiv:2405.04434): keys and values of all heads come from one latent vector."""

    q_lora_rank: int | None
    """None: queries are projected from the hidden state directly."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    """Rotated pairs are neighbours (2i, 2i + 1) in the checkpoint, not (i, i + size/2)."""

    @property
    def cached_size(self) -> int:
        """Elements that the KV cache holds for one token in one layer: the latent vector and the rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv:2309.00071): frequencies that turn less than `beta_slow` times in the original context are divided
    by `factor`, those that turn more than `beta_fast` times are kept, and those between are blended.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """The bounds between these are rounded outwards to whole dimensions."""
    attention_factor: float
    """Multiplies cosines and sines."""
    softmax_factor: float
    """Multiplies the scale of the softmax in latent attention (DeepSeek's mscale_all_dim)."""


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder-only model."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    num_nextn_predict_layers: int
    """Layers behind the others that guess further tokens (DeepSeek); not run."""
    moe: MoeConfig | None
    mla: MlaConfig | None
    """None: grouped-query attention."""

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that carry its position."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @property
    def softmax_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        factor = self.rope_scaling.softmax_factor if self.rope_scaling and self.mla else 1.0
        return self.head_dim**-0.5 * factor

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that the KV cache holds for one token in all layers."""
        in_one_layer = self.mla.cached_size if self.mla else 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * in_one_layer


_MISSING = object()


class _Reader:
    """Reads fields under any of their spellings; a missing one without a default is an error."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self.raw = raw

    def __call__(self, *names: str, default: Any = _MISSING) -> Any:
        for name in names:
            if self.raw.get(name) is not None:
                return self.raw[name]
        if default is _MISSING:
            raise ConfigError(f"{self.path} has no field {' or '.join(map(repr, names))}")
        return default


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; --model-path must be the folder of a checkpoint") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def load_model_config(folder: Path) -> ModelConfig:
    """Reads config.json and generation_config.json. Raises ConfigError for what this engine can't run."""
    path = folder / "config.json"
    read = _Reader(path, read_json(path))
    architectures = read("architectures")
    if len(architectures) != 1:
        raise ConfigError(f"{path}: 'architectures' must name one architecture, got {architectures}")
    heads, hidden = int(read("num_attention_heads")), int(read("hidden_size"))
    if read("hidden_act", default="silu") != "silu":
        raise ConfigError(f"{path}: hidden_act {read('hidden_act')!r} is not supported, only 'silu'")
    if read("use_sliding_window", default=False):
        raise ConfigError(f"{path}: sliding-window attention is not supported")
    mla = _mla_config(read)
    head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else read("head_dim", default=hidden // heads)
    rope_theta, rope_scaling = _rope(read)
    return ModelConfig(
        architecture=architectures[0],
        hidden_size=hidden,
        num_layers=int(read("num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(read("num_key_value_heads", default=heads)),
        head_dim=int(head_dim),
        intermediate_size=int(read("intermediate_size")),
        vocab_size=int(read("vocab_size")),
        rms_norm_eps=float(read("rms_norm_eps")),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=int(read("max_position_embeddings")),
        tie_word_embeddings=bool(read("tie_word_embeddings", default=False)),
        attention_bias=bool(read("attention_bias", default=False)),
        dtype=str(read("dtype", "torch_dtype", default="bfloat16")).removeprefix("torch."),
        eos_token_ids=_eos_token_ids(folder, read),
        num_nextn_predict_layers=int(read("num_nextn_predict_layers", "num_mtp_layers", default=0)),
        moe=_moe_config(read),
        mla=mla,
    )


def _rope(read: _Reader) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and `rope_scaling` in older checkpoints, both in `rope_parameters` in newer ones."""
    parameters = read("rope_parameters", "rope_scaling", default={})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = parameters.get("rope_theta")
    theta = float(theta if theta is not None else read("rope_theta", default=10000.0))
    if kind == "default":
        return theta, None
    if kind == "yarn":
        return theta, _yarn(_Reader(read.path, parameters))
    raise ConfigError(f"{read.path}: rotary embedding of type {kind!r} is not supported, only 'default' and 'yarn'")


def _yarn(read: _Reader) -> RopeScaling:
    """The magnitudes are those of transformers: `mscale` and `mscale_all_dim` are DeepSeek's, and may be absent."""
    factor = float(read("factor"))
    mscale, mscale_all_dim = (float(read(name, default=0)) for name in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        attention_factor = _yarn_magnitude(factor, mscale) / _yarn_magnitude(factor, mscale_all_dim)
    else:
        attention_factor = _yarn_magnitude(factor, 1.0)
    return RopeScaling(
        factor=factor,
        original_max_position_embeddings=int(read("original_max_position_embeddings")),
        beta_fast=float(read("beta_fast", default=32)),
        beta_slow=float(read("beta_slow", default=1)),
        truncate=bool(read("truncate", default=True)),
        attention_factor=float(read("attention_factor", default=attention_factor)),
        softmax_factor=_yarn_magnitude(factor, mscale_all_dim) ** 2,
    )


def _yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _eos_token_ids(folder: Path, read: _Reader) -> tuple[int, ...]:
    """generation_config.json decides where it exists: chat models end turns with a token of their own."""
    value = None
    if (folder / "generation_config.json").exists():
        value = read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        value = read("eos_token_id", default=[])
    return tuple(value) if isinstance(value, list) else (int(value),)


def _mla_config(read: _Reader) -> MlaConfig | None:
    kv_lora_rank = read("kv_lora_rank", default=None)
    if kv_lora_rank is None:
        return None
    q_lora_rank = read("q_lora_rank", default=None)
    return MlaConfig(
        q_lora_rank=None if q_lora_rank is None else int(q_lora_rank),
        kv_lora_rank=int(kv_lora_rank),
        qk_nope_head_dim=int(read("qk_nope_head_dim")),
        qk_rope_head_dim=int(read("qk_rope_head_dim")),
        v_head_dim=int(read("v_head_dim")),
        rope_interleave=bool(read("rope_interleave", default=True)),
    )


def _moe_config(read: _Reader) -> MoeConfig | None:
    num_experts = int(read("num_experts", "num_local_experts", "n_routed_experts", default=0))
    if num_experts == 0:
        return None
    width = int(read("moe_intermediate_size"))
    return MoeConfig(
        num_experts=num_experts,
        top_k=int(read("num_experts_per_tok")),
        intermediate_size=width,
        norm_topk_prob=bool(read("norm_topk_prob", default=False)),
        decoder_sparse_step=int(read("decoder_sparse_step", default=1)),
        mlp_only_layers=_dense_layers(read),
        routing=_grouped_routing(read, num_experts),
        shared_intermediate_size=width * int(read("n_shared_experts", default=0)),
    )


def _dense_layers(read: _Reader) -> tuple[int, ...]:
    """Qwen lists them; DeepSeek says how many come first, and that of the rest every so many is not dense."""
    first, frequency = int(read("first_k_dense_replace", default=0)), int(read("moe_layer_freq", default=1))
    dense = {layer for layer in range(int(read("num_hidden_layers"))) if layer < first or layer % frequency}
    return tuple(sorted(dense | set(read("mlp_only_layers", default=()))))


_ROUTING = {
    "DeepseekV2ForCausalLM": ("softmax", "greedy"),
    "DeepseekV3ForCausalLM": ("sigmoid", "noaux_tc"),
}
"""What a checkpoint of the architecture means that names no `scoring_func` and no `topk_method`."""


def _grouped_routing(read: _Reader, num_experts: int) -> GroupedRouting | None:
    usual = _ROUTING.get(read("architectures")[0])
    if usual is None:
        return None
    scoring_func, method = read("scoring_func", default=usual[0]), read("topk_method", default=usual[1])
    supported = {("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "noaux_tc")}
    if (scoring_func, method) not in supported:
        raise ConfigError(
            f"{read.path}: routing with scoring_func {scoring_func!r} and topk_method {method!r} is not supported, "
            f"only {' or '.join(map(str, sorted(supported)))}"
        )
    if scoring_func == "softmax" and read("norm_topk_prob", default=False):
        raise ConfigError(f"{read.path}: norm_topk_prob with scoring_func 'softmax' is not supported")
    groups, chosen = (int(read(name, default=1)) if method != "greedy" else 1 for name in ("n_group", "topk_group"))
    top_k = int(read("num_experts_per_tok"))
    if num_experts % groups or not 1 <= chosen <= groups or top_k > num_experts // groups * chosen:
        raise ConfigError(
            f"{read.path}: {top_k} experts cannot be chosen from topk_group {chosen} of n_group {groups} groups of "
            f"{num_experts} experts"
        )
    return GroupedRouting(scoring_func, groups, chosen, float(read("routed_scaling_factor", default=1.0)))
