"""Has FlashInfer compile one of what the tests will use: `compile_flashinfer.py KIND`."""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch

from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch

LATENT = SimpleNamespace(kv_lora_rank=512, cached_size=576)


def make_pool(head_dim: int, mla: SimpleNamespace | None = None) -> KvCachePool:
    model = SimpleNamespace(num_kv_heads=2, head_dim=head_dim, num_layers=1, mla=mla)
    return KvCachePool(model, 4, 16, torch.bfloat16, torch.device("cuda"))  # type: ignore[arg-type]


def attend(head_dim: int, queries: int) -> None:
    from nibble.layers.attention.flashinfer_backend import FlashInferBackend

    FlashInferBackend(make_pool(head_dim), 4, torch.bfloat16).plan(AttentionBatch([queries], [8], [[0]]))


def attend_to_latents() -> None:
    from nibble.layers.attention.flashinfer_mla_backend import FlashInferMlaBackend

    backend = FlashInferMlaBackend(make_pool(0, LATENT), 16, LATENT.kv_lora_rank, 1.0, torch.bfloat16)
    backend.plan(AttentionBatch([1], [8], [[0]]))


def normalize() -> None:
    from nibble.kernels.flashinfer.norm import rms_norm

    x = torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda")
    rms_norm(x, x[0], 1e-6)


def activate() -> None:
    from nibble.kernels.flashinfer.norm import silu_and_mul

    silu_and_mul(torch.zeros(2, 64, dtype=torch.bfloat16, device="cuda"))


KINDS: dict[str, Callable[[], None]] = {
    "prompts, heads of 128": partial(attend, 128, 8),  # the slowest first
    "prompts, heads of 64": partial(attend, 64, 8),
    "decoding, heads of 128": partial(attend, 128, 1),
    "decoding, heads of 64": partial(attend, 64, 1),
    "latent attention": attend_to_latents,
    "norms": normalize,
    "activation": activate,
}


if __name__ == "__main__":
    KINDS[sys.argv[1]]()
