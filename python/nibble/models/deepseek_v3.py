"""DeepSeek-V3 and R1, and V2, which differs in numbers and routing: latent attention (MLA), and a shared expert beside
the routed ones.

T: rows of this step, H: hidden size, N: heads of this rank, R: size of the latent vector, D and P: elements of a head
without and with a position, V: elements of a head's values.
"""

from collections.abc import Iterator

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.select import select_kernels
from nibble.layers.attention.backend import AttentionStep
from nibble.layers.attention.latent import AbsorbedKvProjection
from nibble.layers.linear import RowParallelLinear, make_linear, split_heads
from nibble.layers.moe.fused_moe import FusedMoE
from nibble.layers.moe.shared_expert import SharedExpert
from nibble.layers.norm import RMSNorm
from nibble.layers.partial_sum import Summand
from nibble.layers.rotary import RotaryEmbedding
from nibble.layers.weights import Layer, WeightTarget, float_target
from nibble.models.qwen3 import FeedForward, Qwen3DecoderLayer, Qwen3ForCausalLM, Qwen3MLP

LATENT_NORM_EPS = 1e-6
"""Of the norms inside attention; `rms_norm_eps` is not for them."""


class DeepseekV3Attention:
    """Attention on latent vectors: prompts and decoding alike never see keys and values of single heads.

    Every rank of an attention group has all latent vectors and some of the heads; its result is a term of the sum over
    the group.
    """

    def __init__(
        self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int, rotary: RotaryEmbedding
    ) -> None:
        model, mla, group = config.model, config.model.mla, parallel.attn_tp_group
        assert mla is not None
        self.layer, self.rotary, self.interleaved = layer, rotary, mla.rope_interleave
        queries = split_heads(model.num_heads, model.head_dim, group)
        keys_and_values = split_heads(model.num_heads, mla.qk_nope_head_dim + mla.v_head_dim, group)
        values = split_heads(model.num_heads, mla.v_head_dim, group)
        self.heads, self.latent_size = queries.size // model.head_dim, mla.kv_lora_rank
        self.head_parts = [mla.qk_nope_head_dim, mla.qk_rope_head_dim]
        self.down_parts = [mla.q_lora_rank or 0, mla.kv_lora_rank, mla.qk_rope_head_dim]
        down = [("q_a_proj", mla.q_lora_rank)] if mla.q_lora_rank else []
        self.qkv_a_proj = make_linear(
            config,
            prefix,
            model.hidden_size,
            [*down, ("kv_a_proj_with_mqa", mla.cached_size)],
            bias=model.attention_bias,
        )
        self.q_a_layernorm = RMSNorm(config, mla.q_lora_rank, LATENT_NORM_EPS) if mla.q_lora_rank else None
        self.kv_a_layernorm = RMSNorm(config, mla.kv_lora_rank, LATENT_NORM_EPS)
        self.q_proj = make_linear(
            config,
            prefix,
            mla.q_lora_rank or model.hidden_size,
            [("q_b_proj" if mla.q_lora_rank else "q_proj", queries)],
        )
        self.kv_b_proj = AbsorbedKvProjection(config, prefix, keys_and_values)
        self.o_proj = RowParallelLinear(
            config, group, prefix, values, ("o_proj", model.hidden_size), model.attention_bias
        )

    def __call__(self, x: torch.Tensor, positions: torch.Tensor, attention: AttentionStep) -> Summand:
        q_low, latent, k_rope = self.qkv_a_proj(x).split(self.down_parts, dim=-1)
        q = self.q_proj(self.q_a_layernorm(q_low) if self.q_a_layernorm else x)
        q_nope, q_rope = q.view(x.shape[0], self.heads, -1).split(self.head_parts, dim=-1)  # [T, N, D], [T, N, P]
        latent = self.kv_b_proj.quantized(self.kv_a_layernorm(latent))  # [T, R]
        queries, keys = self.rotary.latent(
            self.kv_b_proj.absorb(q_nope), q_rope, latent, k_rope, positions, self.interleaved
        )  # [T, N, R + P], [T, 1, R + P]
        attended = attention.forward(self.layer, queries, keys, keys[..., : self.latent_size])  # [T, N * R]
        return self.o_proj(self.kv_b_proj.expand(attended.unflatten(1, (self.heads, -1))))

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        yield prefix, self.qkv_a_proj
        yield prefix, self.q_proj
        yield prefix, self.kv_b_proj
        yield prefix, self.o_proj
        if self.q_a_layernorm:
            yield f"{prefix}.q_a_layernorm", self.q_a_layernorm
        yield f"{prefix}.kv_a_layernorm", self.kv_a_layernorm


class MoEGate:
    """The router: logits fp32 [T, E] from weights in fp32, so that the choice depends on no rounding of activations."""

    def __init__(self, config: EngineConfig) -> None:
        moe = config.model.moe
        assert moe is not None and moe.routing is not None
        self.linear = select_kernels(config.kernels, config.moe_kernel).linear
        self.weight = torch.empty(moe.num_experts, config.model.hidden_size)  # [E, H]
        is_corrected = moe.routing.scoring_func == "sigmoid"
        self.correction_bias = torch.empty(moe.num_experts) if is_corrected else None  # [E]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.float(), self.weight, None)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = {f"{prefix}.weight": float_target(self.weight)}
        if self.correction_bias is not None:
            targets[f"{prefix}.e_score_correction_bias"] = float_target(self.correction_bias)
        return targets


class DeepseekV3MoE:
    """Routed experts on the rows of all ranks, and the shared expert on those of this rank's attention group."""

    def __init__(self, config: EngineConfig, parallel: ParallelState, prefix: str) -> None:
        moe = config.model.moe
        assert moe is not None
        self.gate = MoEGate(config)
        self.experts = FusedMoE(config, parallel, f"{prefix}.experts", self.gate.correction_bias)
        self.shared_mlp = Qwen3MLP(
            config, parallel.dense_tp_group, f"{prefix}.shared_experts", moe.shared_intermediate_size
        )
        self.shared_expert = SharedExpert(self.shared_mlp, parallel.device)

    def __call__(self, x: torch.Tensor) -> Summand:
        return self.shared_expert.add_to(self.routed, x)

    def routed(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.gate(x))

    def layers(self, prefix: str) -> Iterator[tuple[str, Layer]]:
        yield f"{prefix}.gate", self.gate
        yield f"{prefix}.experts", self.experts
        yield from self.shared_mlp.layers(f"{prefix}.shared_experts")


class DeepseekV3DecoderLayer(Qwen3DecoderLayer):
    def make_attention(
        self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int, rotary: RotaryEmbedding
    ) -> DeepseekV3Attention:
        return DeepseekV3Attention(config, parallel, prefix, layer, rotary)

    def make_mlp(self, config: EngineConfig, parallel: ParallelState, prefix: str, layer: int) -> FeedForward:
        moe = config.model.moe
        if moe is not None and moe.is_moe_layer(layer):
            return DeepseekV3MoE(config, parallel, prefix)
        return super().make_mlp(config, parallel, prefix, layer)


class DeepseekV3ForCausalLM(Qwen3ForCausalLM):
    decoder_layer = DeepseekV3DecoderLayer

    def __init__(self, config: EngineConfig, parallel: ParallelState) -> None:
        super().__init__(config, parallel)
        first, count = config.model.num_layers, config.model.num_nextn_predict_layers
        self.unused_prefixes = tuple(f"model.layers.{layer}." for layer in range(first, first + count))


class DeepseekV2ForCausalLM(DeepseekV3ForCausalLM):
    pass
