"""Qwen3: dense decoder with grouped-query attention and normalized heads (also the frame of Qwen3-MoE).

T: rows of this step, H: hidden size, N: heads, D: head size.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import Communicator
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.select import select_kernels
from nibble.layers.attention.backend import AttentionStep
from nibble.layers.attention.kv_scales import KvCacheScales
from nibble.layers.embedding import LMHead, TiedLMHead, VocabEmbedding
from nibble.layers.linear import RowParallelLinear, make_linear, split_heads, split_width
from nibble.layers.norm import RMSNorm
from nibble.layers.partial_sum import Summand, complete
from nibble.layers.rotary import RotaryEmbedding
from nibble.layers.weights import Layer


class Qwen3Attention:
    """The heads of one rank: its result is a term of the sum over the attention group."""

    def __init__(
        self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int, rotary: RotaryEmbedding
    ) -> None:
        model, group = config.model, parallel.attn_tp_group
        self.layer, self.head_dim, self.rotary = layer, model.head_dim, rotary
        q = split_heads(model.num_heads, model.head_dim, group)
        kv = split_heads(model.num_kv_heads, model.head_dim, group)
        self.heads = [shard.size // model.head_dim for shard in (q, kv, kv)]
        self.qkv_proj = make_linear(
            config, prefix, model.hidden_size, [("q_proj", q), ("k_proj", kv), ("v_proj", kv)], model.attention_bias
        )
        self.o_proj = RowParallelLinear(config, group, prefix, q, ("o_proj", model.hidden_size), model.attention_bias)
        self.q_norm = RMSNorm(config, model.head_dim)
        self.k_norm = RMSNorm(config, model.head_dim)
        self.kv_scales = KvCacheScales(config)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> Summand:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = torch.split_with_sizes(qkv, self.heads, dim=1)  # [T, N, D]
        q, k = self.rotary.normalized(q, k, self.q_norm, self.k_norm, positions)
        return self.o_proj(self.kv_scales.attend(attention, self.layer, q, k, v))

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        yield prefix, self.qkv_proj
        yield prefix, self.o_proj
        yield prefix, self.kv_scales
        yield f"{prefix}.q_norm", self.q_norm
        yield f"{prefix}.k_norm", self.k_norm


class Attention(Protocol):
    """What begins a decoder layer: `x [T, H]` at `positions [T]` to `[T, H]`."""

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> Summand: ...

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]: ...


class FeedForward(Protocol):
    """What follows attention in a decoder layer: `[T, H] -> [T, H]`, with T 0 on an idle rank."""

    def __call__(self, x: torch.Tensor) -> Summand: ...

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]: ...


class Qwen3MLP:
    """Split in width over `group`."""

    def __init__(self, config: EngineConfig, group: Communicator, prefix: str, width: int) -> None:
        hidden, shard = config.model.hidden_size, split_width(config, width, group)
        self.gate_up_proj = make_linear(config, prefix, hidden, [("gate_proj", shard), ("up_proj", shard)])
        self.down_proj = RowParallelLinear(config, group, prefix, shard, ("down_proj", hidden))
        self.silu_and_mul = select_kernels(config.kernels, config.moe_kernel).silu_and_mul

    def __call__(self, x: torch.Tensor) -> Summand:
        return self.down_proj(self.silu_and_mul(self.gate_up_proj(x))) if x.shape[0] else x

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        yield prefix, self.gate_up_proj
        yield prefix, self.down_proj


class Qwen3DecoderLayer:
    def __init__(self, config: EngineConfig, parallel: ParallelState, layer: int, rotary: RotaryEmbedding) -> None:
        hidden_size = config.model.hidden_size
        self.prefix = f"model.layers.{layer}"
        self.self_attn = self.make_attention(config, parallel, f"{self.prefix}.self_attn", layer, rotary)
        self.mlp = self.make_mlp(config, parallel, f"{self.prefix}.mlp", layer)
        self.input_layernorm = RMSNorm(config, hidden_size)
        self.post_attention_layernorm = RMSNorm(config, hidden_size)

    def make_attention(
        self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int, rotary: RotaryEmbedding
    ) -> Attention:
        return Qwen3Attention(config, parallel, prefix, layer, rotary)

    def make_mlp(self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int) -> FeedForward:
        return Qwen3MLP(config, parallel.dense_tp_group, prefix, config.model.intermediate_size)

    def __call__(
        self,
        hidden: Summand,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        attention: AttentionStep | None,
    ) -> tuple[Summand, torch.Tensor]:
        """`[T, H]` twice: what this layer's last part adds to the residual, and the residual before that."""
        if attention is None:  # an idle rank has no rows, and enters only what is collective
            nothing = complete(hidden)
            return self.mlp(nothing), nothing
        if residual is None:
            residual = complete(hidden)
            normed = self.input_layernorm(residual)
        else:
            normed, residual = self.input_layernorm.after_adding(hidden, residual)
        attended = self.self_attn(normed, positions, attention)
        normed, residual = self.post_attention_layernorm.after_adding(attended, residual)
        return self.mlp(normed), residual

    def layers(self) -> Iterator[tuple[str, Layer]]:
        yield from self.self_attn.layers(f"{self.prefix}.self_attn")
        yield from self.mlp.layers(f"{self.prefix}.mlp")
        yield f"{self.prefix}.input_layernorm", self.input_layernorm
        yield f"{self.prefix}.post_attention_layernorm", self.post_attention_layernorm


class Qwen3ForCausalLM:
    decoder_layer = Qwen3DecoderLayer
    unused_prefixes: tuple[str, ...] = ()

    def __init__(self, config: EngineConfig, parallel: ParallelState) -> None:
        model = config.model
        rotary = RotaryEmbedding(config)
        self.embed_tokens = VocabEmbedding(config, parallel)
        self.decoder = [self.decoder_layer(config, parallel, layer, rotary) for layer in range(model.num_layers)]
        self.norm = RMSNorm(config, model.hidden_size)
        if model.tie_word_embeddings:
            self.lm_head: TiedLMHead | LMHead = TiedLMHead(self.embed_tokens)
        else:
            self.lm_head = LMHead(config, parallel)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep | None
    ) -> torch.Tensor:
        """Hidden states `[T, H]` for `input_ids [T]`; `attention` is None exactly when T is 0."""
        hidden: Summand = self.embed_tokens(input_ids)
        residual: torch.Tensor | None = None
        for layer in self.decoder:
            hidden, residual = layer(hidden, residual, positions, attention)
        return complete(hidden) if residual is None else complete(hidden) + residual

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """fp32 logits `[R, vocab]` for the rows `[R, H]` of `forward` that need them."""
        return self.lm_head(self.norm(hidden)).float()

    def layers(self) -> Iterator[tuple[str, Layer]]:
        """Every layer that takes weights, with its prefix in the checkpoint."""
        yield "model.embed_tokens", self.embed_tokens
        for layer in self.decoder:
            yield from layer.layers()
        yield "model.norm", self.norm
        yield "lm_head", self.lm_head
