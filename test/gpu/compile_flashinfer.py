"""Has FlashInfer compile what the tests will use, for heads of one size: `compile_flashinfer.py HEAD_DIM`."""

import sys
from types import SimpleNamespace

import torch

from nibble.kernels.flashinfer.norm import rms_norm, silu_and_mul
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.flashinfer_backend import FlashInferBackend


def main() -> None:
    model = SimpleNamespace(num_kv_heads=2, head_dim=int(sys.argv[1]), num_layers=1, mla=None)
    pool = KvCachePool(model, 4, 16, torch.bfloat16, torch.device("cuda"))  # type: ignore[arg-type]
    backend = FlashInferBackend(pool, 4, torch.bfloat16)
    for queries in (8, 1):
        backend.plan(AttentionBatch([queries], [8], [[0]]))
    x = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda")
    silu_and_mul(rms_norm(x, x[0], 1e-6))


if __name__ == "__main__":
    main()
