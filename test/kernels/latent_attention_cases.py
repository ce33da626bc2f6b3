"""Latent attention through the Triton backend beside PyTorch's, interpreted or on a GPU."""

from types import SimpleNamespace

import torch

from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.torch_backend import TorchAttentionBackend
from nibble.layers.attention.triton_mla_backend import TritonMlaBackend

SCALE = 0.13


def backends(
    rank: int, rope: int, page_size: int, num_pages: int, dtype: torch.dtype, device: str
) -> tuple[TritonMlaBackend, TorchAttentionBackend]:
    """Each with a cache of its own, both of the same random numbers."""
    latent = SimpleNamespace(kv_lora_rank=rank, cached_size=rank + rope)
    model = SimpleNamespace(num_layers=2, mla=latent)
    ours, theirs = (
        KvCachePool(model, num_pages, page_size, dtype, torch.device(device))  # type: ignore[arg-type]
        for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        b.copy_(a.copy_(torch.randn(a.shape, generator=generator)))
    return TritonMlaBackend(ours, rank, SCALE), TorchAttentionBackend(theirs, SCALE)


def batch_of(seq_lens: list[int], page_size: int, num_pages: int, seed: int = 0) -> AttentionBatch:
    """Sequences with one query each, whose pages are scattered."""
    pages = iter(torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist())
    tables = [[next(pages) for _ in range(-(-length // page_size))] for length in seq_lens]
    return AttentionBatch([1] * len(seq_lens), seq_lens, tables)


def random_qkv(
    rows: int, heads: int, rank: int, rope: int, dtype: torch.dtype, device: str, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, heads, rank + rope, generator=generator).to(device, dtype)
    k = torch.randn(rows, 1, rank + rope, generator=generator).to(device, dtype)
    return q, k, k[..., :rank]


def check_decode(
    seq_lens: list[int], heads: int, rank: int, rope: int, page_size: int, dtype: torch.dtype, device: str
) -> None:
    num_pages = sum(-(-length // page_size) for length in seq_lens) + 3
    ours, theirs = backends(rank, rope, page_size, num_pages, dtype, device)
    batch = batch_of(seq_lens, page_size, num_pages)
    for layer in range(2):
        qkv = random_qkv(len(seq_lens), heads, rank, rope, dtype, device)
        found, expected = (backend.plan(batch).forward(layer, *qkv) for backend in (ours, theirs))
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(ours.pool.keys[layer], theirs.pool.keys[layer])
