"""Qwen3-MoE: Qwen3 with routed experts in place of the feed-forward layers."""

from collections.abc import Iterator

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.layers.linear import make_linear
from nibble.layers.moe.fused_moe import FusedMoE
from nibble.layers.weights import Layer
from nibble.models.qwen3 import FeedForward, Qwen3DecoderLayer, Qwen3ForCausalLM


class Qwen3MoeSparseMoeBlock:
    """The router runs on the rows of this rank's attention group; the experts on those of all groups."""

    def __init__(self, config: EngineConfig, parallel: ParallelState, prefix: str) -> None:
        moe = config.model.moe
        assert moe is not None
        self.gate = make_linear(config, prefix, config.model.hidden_size, [("gate", moe.num_experts)])
        self.experts = FusedMoE(config, parallel, f"{prefix}.experts")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.gate(x))

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        yield prefix, self.gate
        yield f"{prefix}.experts", self.experts


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    def make_mlp(self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int) -> FeedForward:
        moe = config.model.moe
        assert moe is not None
        if moe.is_moe_layer(layer):
            return Qwen3MoeSparseMoeBlock(config, parallel, prefix)
        return super().make_mlp(config, parallel, prefix, layer)


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    decoder_layer = Qwen3MoeDecoderLayer
