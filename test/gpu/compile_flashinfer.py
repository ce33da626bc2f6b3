"""Has FlashInfer compile what the tests will use: `compile_flashinfer.py HEAD_DIM`, or `mla` for latent attention."""

import sys
from types import SimpleNamespace

import torch

from nibble.kernels.flashinfer.norm import rms_norm, silu_and_mul
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBackend, AttentionBatch
from nibble.layers.attention.flashinfer_backend import FlashInferBackend
from nibble.layers.attention.flashinfer_mla_backend import FlashInferMlaBackend


def backend_for(kind: str) -> AttentionBackend:
    latent = SimpleNamespace(kv_lora_rank=512, cached_size=576)
    is_latent = kind == "mla"
    model = SimpleNamespace(
        num_kv_heads=2, head_dim=0 if is_latent else int(kind), num_layers=1, mla=latent if is_latent else None
    )
    pool = KvCachePool(model, 4, 16, torch.bfloat16, torch.device("cuda"))  # type: ignore[arg-type]
    if is_latent:
        return FlashInferMlaBackend(pool, 16, latent.kv_lora_rank, 1.0, torch.bfloat16)
    return FlashInferBackend(pool, 4, torch.bfloat16)


def main() -> None:
    backend = backend_for(sys.argv[1])
    for queries in (8, 1):
        backend.plan(AttentionBatch([queries], [8], [[0]]))
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda")
    silu_and_mul(rms_norm(x, x[0], 1e-6))


if __name__ == "__main__":
    main()
