"""Attention backends by the names that `config.resolve` decides on."""

from nibble.config.resolve import EngineConfig
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBackend
from nibble.utils.dtypes import torch_dtype


def create_attention_backend(config: EngineConfig, pool: KvCachePool) -> AttentionBackend:
    match config.attention_backend:
        case "flashinfer" if mla := config.model.mla:
            from nibble.layers.attention.flashinfer_mla_backend import FlashInferMlaBackend

            return FlashInferMlaBackend(
                pool,
                config.parallel.share_of(config.model).num_heads,
                mla.kv_lora_rank,
                config.model.softmax_scale,
                torch_dtype(config.dtype),
            )
        case "flashinfer":
            from nibble.layers.attention.flashinfer_backend import FlashInferBackend

            return FlashInferBackend(pool, config.parallel.share_of(config.model).num_heads, torch_dtype(config.dtype))
        case "triton":
            from nibble.layers.attention.triton_mla_backend import TritonMlaBackend

            assert config.model.mla is not None
            return TritonMlaBackend(pool, config.model.mla.kv_lora_rank, config.model.softmax_scale)
        case "c":
            from nibble.layers.attention.cpu_backend import CpuAttentionBackend

            return CpuAttentionBackend(pool, config.model.softmax_scale)
        case _:
            from nibble.layers.attention.torch_backend import TorchAttentionBackend

            return TorchAttentionBackend(pool, config.model.softmax_scale)
