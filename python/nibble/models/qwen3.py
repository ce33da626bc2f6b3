"""Qwen3: dense decoder with grouped-query attention and normalized heads (also the frame of Qwen3-MoE).

T: rows of this step, H: hidden size, N: heads, D: head size.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.select import select_kernels
from nibble.layers.attention.backend import AttentionStep
from nibble.layers.embedding import LMHead, TiedLMHead, VocabEmbedding
from nibble.layers.linear import make_linear
from nibble.layers.norm import RMSNorm
from nibble.layers.rotary import RotaryEmbedding
from nibble.layers.weights import Layer
from nibble.utils.dtypes import torch_dtype


class Qwen3Attention:
    def __init__(self, config: EngineConfig, prefix: str, layer: int, rotary: RotaryEmbedding) -> None:
        model = config.model
        self.layer, self.head_dim, self.rotary = layer, model.head_dim, rotary
        self.heads = [model.num_heads, model.num_kv_heads, model.num_kv_heads]
        q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        self.qkv_proj = make_linear(
            config,
            prefix,
            model.hidden_size,
            [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)],
            bias=model.attention_bias,
        )
        self.o_proj = make_linear(config, prefix, q_size, [("o_proj", model.hidden_size)], bias=model.attention_bias)
        self.q_norm = RMSNorm(config, model.head_dim)
        self.k_norm = RMSNorm(config, model.head_dim)

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> torch.Tensor:
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = torch.split_with_sizes(qkv, self.heads, dim=1)  # [T, N, D]
        q, k = self.rotary.normalized(q, k, self.q_norm, self.k_norm, positions)
        return self.o_proj(attention.forward(self.layer, q, k, v))

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        yield prefix, self.qkv_proj
        yield prefix, self.o_proj
        yield f"{prefix}.q_norm", self.q_norm
        yield f"{prefix}.k_norm", self.k_norm


class FeedForward(Protocol):
    """What follows attention in a decoder layer: `[T, H] -> [T, H]`, with T 0 on an idle rank."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]: ...


class Qwen3MLP:
    def __init__(self, config: EngineConfig, prefix: str) -> None:
        hidden, width = config.model.hidden_size, config.model.intermediate_size
        self.gate_up_proj = make_linear(config, prefix, hidden, [("gate_proj", width), ("up_proj", width)])
        self.down_proj = make_linear(config, prefix, width, [("down_proj", hidden)])
        self.silu_and_mul = select_kernels(config.kernels, config.moe_kernel).silu_and_mul

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.silu_and_mul(self.gate_up_proj(x))) if x.shape[0] else x

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        yield prefix, self.gate_up_proj
        yield prefix, self.down_proj


class Qwen3DecoderLayer:
    def __init__(self, config: EngineConfig, parallel: ParallelState, layer: int, rotary: RotaryEmbedding) -> None:
        hidden_size = config.model.hidden_size
        self.prefix = f"model.layers.{layer}"
        self.self_attn = Qwen3Attention(config, f"{self.prefix}.self_attn", layer, rotary)
        self.mlp = self.make_mlp(config, parallel, f"{self.prefix}.mlp", layer)
        self.input_layernorm = RMSNorm(config, hidden_size)
        self.post_attention_layernorm = RMSNorm(config, hidden_size)

    def make_mlp(self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int) -> FeedForward:
        return Qwen3MLP(config, prefix)

    def __call__(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        attention: AttentionStep | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[T, H]` twice: what this layer's last part adds to the residual, and the residual before that."""
        if attention is None:  # an idle rank has no rows, and enters only what is collective
            return self.mlp(hidden), hidden
        if residual is None:
            normed, residual = self.input_layernorm(hidden), hidden
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

    def __init__(self, config: EngineConfig, parallel: ParallelState) -> None:
        model, dtype = config.model, torch_dtype(config.dtype)
        rotary = RotaryEmbedding(config)
        self.embed_tokens = VocabEmbedding(model.vocab_size, model.hidden_size, dtype)
        self.decoder = [self.decoder_layer(config, parallel, layer, rotary) for layer in range(model.num_layers)]
        self.norm = RMSNorm(config, model.hidden_size)
        if model.tie_word_embeddings:
            self.lm_head: TiedLMHead | LMHead = TiedLMHead(self.embed_tokens)
        else:
            self.lm_head = LMHead(model.vocab_size, model.hidden_size, dtype)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, attention: AttentionStep | None
    ) -> torch.Tensor:
        """Hidden states `[T, H]` for `input_ids [T]`; `attention` is None exactly when T is 0."""
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.decoder:
            hidden, residual = layer(hidden, residual, positions, attention)
        return hidden if residual is None else hidden + residual

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
