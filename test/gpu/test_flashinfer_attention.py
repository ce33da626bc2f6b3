"""FlashInfer's attention gives what torch's gives, on caches of any page size, for decoding, prompts and both."""

from types import SimpleNamespace

import pytest
import torch

from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.torch_backend import TorchAttentionBackend

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BATCHES = {
    "decoding": ([1, 1, 1], [1, 37, 300]),
    "one prompt": ([70], [70]),
    "a chunk behind others": ([40], [130]),
    "decoding beside prompts": ([1, 1, 40, 5], [90, 16, 40, 21]),
}
HEADS = [(32, 4, 128), (4, 2, 64), (8, 8, 64)]


def pools(heads: tuple[int, int, int], page_size: int) -> list[KvCachePool]:
    """Two with the same random content, for backends that each write into their own."""
    _, kv_heads, size = heads
    model = SimpleNamespace(num_kv_heads=kv_heads, head_dim=size, num_layers=2)
    made = [KvCachePool(model, 640 // page_size * 2, page_size, torch.bfloat16, DEVICE) for _ in range(2)]  # type: ignore[arg-type]
    for first, second in ((made[0].keys, made[1].keys), (made[0].values, made[1].values)):
        for a, b in zip(first, second, strict=True):
            b.copy_(a.normal_())
    return made


def batch_of(name: str, page_size: int) -> AttentionBatch:
    query_lens, seq_lens = BATCHES[name]
    pages = iter(torch.randperm(640 // page_size * 2, generator=torch.Generator().manual_seed(1)).tolist())
    tables = [[next(pages) for _ in range(-(-length // page_size))] for length in seq_lens]
    return AttentionBatch(query_lens, seq_lens, tables)


def random_qkv(heads: tuple[int, int, int], rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_heads, kv_heads, size = heads
    qkv = torch.randn(rows, num_heads + 2 * kv_heads, size, dtype=torch.bfloat16, device=DEVICE)
    q, k, v = qkv.split([num_heads, kv_heads, kv_heads], dim=1)
    return q.contiguous(), k.contiguous(), v  # as after the rotary embedding


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", BATCHES)
def test_attention_is_that_of_torch(name: str, heads: tuple[int, int, int], page_size: int) -> None:
    from nibble.layers.attention.flashinfer_backend import FlashInferBackend

    batch = batch_of(name, page_size)
    ours, theirs = pools(heads, page_size)
    flashinfer, reference = FlashInferBackend(ours, heads[0], torch.bfloat16), TorchAttentionBackend(theirs)
    found, expected = flashinfer.plan(batch), reference.plan(batch)
    for layer in range(2):
        q, k, v = random_qkv(heads, sum(batch.query_lens))
        torch.testing.assert_close(
            found.forward(layer, q, k, v), expected.forward(layer, q, k, v), rtol=2e-2, atol=1e-2
        )
        assert torch.equal(ours.keys[layer], theirs.keys[layer])
        assert torch.equal(ours.values[layer], theirs.values[layer])


def test_a_captured_step_follows_its_plan() -> None:
    """The lengths, the pages and the slots of the capture must not stay behind in the graph."""
    from nibble.layers.attention.flashinfer_backend import FlashInferBackend

    heads, page_size, rows = HEADS[0], 16, 3
    ours, theirs = pools(heads, page_size)
    flashinfer, reference = FlashInferBackend(ours, heads[0], torch.bfloat16), TorchAttentionBackend(theirs)
    step = flashinfer.graph_step(rows, 80)
    q, k, v = random_qkv(heads, rows)
    step.plan(AttentionBatch([1] * rows, [1] * rows, [[ours.padding_page]] * rows))
    step.forward(0, q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.forward(0, q, k, v)
    for lengths in ([1, 37, 300], [2, 38, 301], [289, 1, 16]):
        now = AttentionBatch([1] * rows, lengths, _disjoint(lengths, page_size))
        for tensor in (q, k, v):
            tensor.normal_()
        step.plan(now)
        graph.replay()
        expected = reference.plan(now).forward(0, q, k, v)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)
        kept = slice(0, ours.num_pages)
        assert torch.equal(ours.keys[0][kept], theirs.keys[0][kept])


def _disjoint(lengths: list[int], page_size: int) -> list[list[int]]:
    counts = [-(-length // page_size) for length in lengths]
    return [list(range(sum(counts[:i]), sum(counts[: i + 1])))[::-1] for i in range(len(counts))]
