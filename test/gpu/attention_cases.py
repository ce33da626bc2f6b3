"""Attention through FlashInfer beside that of torch, on caches with the same content."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch, GraphAttentionBackend
from nibble.layers.attention.torch_backend import TorchAttentionBackend

DEVICE = torch.device("cuda")
BATCHES = {
    "decoding": ([1, 1, 1], [1, 37, 300]),
    "one prompt": ([70], [70]),
    "a chunk behind others": ([40], [130]),
    "decoding beside prompts": ([1, 1, 40, 5], [90, 16, 40, 21]),
}
SCALE = 0.11  # of no size's square root, so that a backend that chooses its own is found out


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    size: int
    kv_lora_rank: int | None = None
    """Of latent attention."""

    @property
    def scale(self) -> float:
        return SCALE if self.kv_lora_rank else self.size**-0.5

    def pool(self, page_size: int) -> KvCachePool:
        mla = SimpleNamespace(cached_size=self.size, kv_lora_rank=self.kv_lora_rank) if self.kv_lora_rank else None
        model = SimpleNamespace(num_kv_heads=self.kv_heads, head_dim=self.size, num_layers=2, mla=mla)
        return KvCachePool(model, 640 // page_size * 2, page_size, torch.bfloat16, DEVICE)  # type: ignore[arg-type]

    def flashinfer(self, pool: KvCachePool) -> GraphAttentionBackend:
        if self.kv_lora_rank:
            from nibble.layers.attention.flashinfer_mla_backend import FlashInferMlaBackend

            return FlashInferMlaBackend(pool, self.heads, self.kv_lora_rank, self.scale, torch.bfloat16)
        from nibble.layers.attention.flashinfer_backend import FlashInferBackend

        return FlashInferBackend(pool, self.heads, torch.bfloat16)


def pools(shape: Shape, page_size: int) -> tuple[KvCachePool, KvCachePool]:
    """Two with the same random content, for backends that each write into their own."""
    first, second = shape.pool(page_size), shape.pool(page_size)
    for a, b in zip(first.tensors, second.tensors, strict=True):
        b.copy_(a.normal_())
    return first, second


def batch_of(name: str, page_size: int) -> AttentionBatch:
    query_lens, seq_lens = BATCHES[name]
    pages = iter(torch.randperm(640 // page_size * 2, generator=torch.Generator().manual_seed(1)).tolist())
    tables = [[next(pages) for _ in range(-(-length // page_size))] for length in seq_lens]
    return AttentionBatch(query_lens, seq_lens, tables)


def random_qkv(shape: Shape, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    qkv = torch.randn(rows, shape.heads + 2 * shape.kv_heads, shape.size, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
    k = k.contiguous()  # as after the rotary embedding
    return q.contiguous(), k, k[..., : shape.kv_lora_rank] if shape.kv_lora_rank else v


def assert_like_torch(name: str, shape: Shape, page_size: int) -> None:
    batch = batch_of(name, page_size)
    ours, theirs = pools(shape, page_size)
    found, expected = shape.flashinfer(ours).plan(batch), TorchAttentionBackend(theirs, shape.scale).plan(batch)
    for layer in range(2):
        q, k, v = random_qkv(shape, sum(batch.query_lens))
        torch.testing.assert_close(
            found.forward(layer, q, k, v), expected.forward(layer, q, k, v), rtol=2e-2, atol=1e-2
        )
        assert torch.equal(ours.keys[layer], theirs.keys[layer])
        assert torch.equal(ours.values[layer], theirs.values[layer])


def assert_a_captured_step_follows_its_plan(shape: Shape) -> None:
    """The lengths, the pages and the slots of the capture must not stay behind in the graph."""
    page_size, rows = 16, 3
    ours, theirs = pools(shape, page_size)
    reference = TorchAttentionBackend(theirs, shape.scale)
    step = shape.flashinfer(ours).graph_step(rows, 80)
    q, k, v = random_qkv(shape, rows)
    step.plan(AttentionBatch([1] * rows, [1] * rows, [[ours.padding_page]] * rows))
    step.forward(0, q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.forward(0, q, k, v)
    for lengths in ([1, 37, 300], [2, 38, 301], [289, 1, 16]):
        now = AttentionBatch([1] * rows, lengths, _disjoint(lengths, page_size))
        for tensor, new in zip((q, k, v), random_qkv(shape, rows), strict=True):
            tensor.copy_(new)
        step.plan(now)
        graph.replay()
        expected = reference.plan(now).forward(0, q, k, v)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)
        kept = slice(0, ours.num_pages)
        assert torch.equal(ours.keys[0][kept], theirs.keys[0][kept])


def _disjoint(lengths: list[int], page_size: int) -> list[list[int]]:
    counts = [-(-length // page_size) for length in lengths]
    return [list(range(sum(counts[:i]), sum(counts[: i + 1])))[::-1] for i in range(len(counts))]
