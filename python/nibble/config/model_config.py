"""What a checkpoint's config.json says, in one form for old and new spellings."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nibble.utils.errors import ConfigError


@dataclass(frozen=True)
class MoeConfig:
    """Routing and shape of the mixture-of-experts layers."""

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    decoder_sparse_step: int
    mlp_only_layers: tuple[int, ...]

    def is_moe_layer(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


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
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: str
    eos_token_ids: tuple[int, ...]
    moe: MoeConfig | None

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that the KV cache holds for one token, keys and values of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


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
    return ModelConfig(
        architecture=architectures[0],
        hidden_size=hidden,
        num_layers=int(read("num_hidden_layers")),
        num_heads=heads,
        num_kv_heads=int(read("num_key_value_heads", default=heads)),
        head_dim=int(read("head_dim", default=hidden // heads)),
        intermediate_size=int(read("intermediate_size")),
        vocab_size=int(read("vocab_size")),
        rms_norm_eps=float(read("rms_norm_eps")),
        rope_theta=_rope_theta(read),
        max_position_embeddings=int(read("max_position_embeddings")),
        tie_word_embeddings=bool(read("tie_word_embeddings", default=False)),
        attention_bias=bool(read("attention_bias", default=False)),
        dtype=str(read("dtype", "torch_dtype", default="bfloat16")).removeprefix("torch."),
        eos_token_ids=_eos_token_ids(folder, read),
        moe=_moe_config(read),
    )


def _rope_theta(read: _Reader) -> float:
    """`rope_theta` and `rope_scaling` in older checkpoints, both in `rope_parameters` in newer ones."""
    parameters = read("rope_parameters", "rope_scaling", default={})
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{read.path}: rotary embedding of type {kind!r} is not supported, only 'default'")
    theta = parameters.get("rope_theta")
    return float(theta if theta is not None else read("rope_theta", default=10000.0))


def _eos_token_ids(folder: Path, read: _Reader) -> tuple[int, ...]:
    """generation_config.json decides where it exists: chat models end turns with a token of their own."""
    value = None
    if (folder / "generation_config.json").exists():
        value = read_json(folder / "generation_config.json").get("eos_token_id")
    if value is None:
        value = read("eos_token_id", default=[])
    return tuple(value) if isinstance(value, list) else (int(value),)


def _moe_config(read: _Reader) -> MoeConfig | None:
    num_experts = int(read("num_experts", "num_local_experts", default=0))
    if num_experts == 0:
        return None
    return MoeConfig(
        num_experts=num_experts,
        top_k=int(read("num_experts_per_tok")),
        intermediate_size=int(read("moe_intermediate_size")),
        norm_topk_prob=bool(read("norm_topk_prob", default=False)),
        decoder_sparse_step=int(read("decoder_sparse_step", default=1)),
        mlp_only_layers=tuple(read("mlp_only_layers", default=())),
    )
