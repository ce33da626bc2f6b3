"""Model families by the architecture that a checkpoint names."""

import importlib
from collections.abc import Iterator
from typing import Protocol, cast

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.layers.attention.backend import AttentionStep
from nibble.layers.weights import Layer
from nibble.utils.errors import ConfigError

ARCHITECTURES = {
    "Qwen3ForCausalLM": "nibble.models.qwen3",
    "Qwen3MoeForCausalLM": "nibble.models.qwen3_moe",
    "DeepseekV2ForCausalLM": "nibble.models.deepseek_v3",
    "DeepseekV3ForCausalLM": "nibble.models.deepseek_v3",
}
"""The module that defines each architecture's class."""


class CausalLM(Protocol):
    """What the model runner needs of a model."""

    unused_prefixes: tuple[str, ...]
    """Names in a checkpoint that begin so are of parts that are not run."""

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep | None
    ) -> torch.Tensor: ...

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor: ...

    def layers(self) -> Iterator[tuple[str, Layer]]: ...


def create_model(config: EngineConfig, parallel: ParallelState) -> CausalLM:
    """The model with uninitialized weights. Raises ConfigError for an unknown architecture."""
    name = config.model.architecture
    if name not in ARCHITECTURES:
        raise ConfigError(f"architecture {name!r} is not supported, only {', '.join(ARCHITECTURES)}")
    model_class = getattr(importlib.import_module(ARCHITECTURES[name]), name)
    return cast(CausalLM, model_class(config, parallel))
