"""Paged attention against plain attention in float64, for any mix of prompts, chunks and decoding sequences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.config.model_config import ModelConfig
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.cpu_backend import CpuAttentionBackend
from nibble.layers.attention.torch_backend import TorchAttentionBackend

HEADS, KV_HEADS, SIZE, PAGE = 4, 2, 16, 4
BACKENDS = (TorchAttentionBackend, CpuAttentionBackend)
PAGES = 64


SHAPE = {"num_layers": 2, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": SIZE}
MODEL = ModelConfig(**{**dict.fromkeys(ModelConfig.__dataclass_fields__, 0), **SHAPE})


def make_pool() -> KvCachePool:
    return KvCachePool(MODEL, PAGES, PAGE, torch.float32, torch.device("cpu"))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last len(q) tokens of a sequence. q [Q, N, D], k and v [L, KV, D]."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qnd,lnd->nql", q, k) / SIZE**0.5
    length, queries = len(k), len(q)
    future = torch.arange(length) > torch.arange(length - queries, length)[:, None]
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("nql,lnd->qnd", weights, v).reshape(queries, -1)


sequences = st.lists(
    st.tuples(st.integers(0, 14), st.one_of(st.just(1), st.integers(1, 9))), min_size=1, max_size=6
).map(lambda items: sorted(items, key=lambda item: item[1] > 1))


@pytest.mark.parametrize("make_backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(items=sequences, seed=st.integers(0, 1000))
def test_any_mix_of_sequences_attends_to_its_own_past_only(make_backend, items, seed):
    generator = torch.Generator().manual_seed(seed)
    pool = make_pool()
    backend = make_backend(pool)
    pages = torch.randperm(PAGES, generator=generator).tolist()
    tables, keys, values = [], [], []
    for past, queries in items:
        count = -(-(past + queries) // PAGE)
        tables.append([pages.pop() for _ in range(count)])
        keys.append(torch.randn(past + queries, KV_HEADS, SIZE, generator=generator))
        values.append(torch.randn(past + queries, KV_HEADS, SIZE, generator=generator))
    layer = seed % 2
    for (past, _), table, k, v in zip(items, tables, keys, values, strict=True):
        if past:
            step = backend.plan(AttentionBatch([past], [past], [table]))
            step.forward(layer, torch.zeros(past, HEADS, SIZE), k[:past], v[:past])
    lens = [queries for _, queries in items]
    q = torch.randn(sum(lens), HEADS, SIZE, generator=generator)
    batch = AttentionBatch(lens, [past + queries for past, queries in items], tables)
    new = [torch.cat([x[past:] for (past, _), x in zip(items, tensors, strict=True)]) for tensors in (keys, values)]
    out = backend.plan(batch).forward(layer, q, *new)
    expected = [reference(*parts) for parts in zip(q.split(lens), keys, values, strict=True)]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make_backend", BACKENDS)
def test_pages_of_a_failed_request_are_cleared_for_whoever_uses_them_next(make_backend):
    """Masked slots are multiplied by zero, and zero times NaN is NaN."""
    pool = make_pool()
    backend = make_backend(pool)
    bad = torch.full((PAGE, KV_HEADS, SIZE), float("nan"))
    backend.plan(AttentionBatch([PAGE], [PAGE], [[3]])).forward(0, torch.zeros(PAGE, HEADS, SIZE), bad, bad)
    one = torch.ones(1, KV_HEADS, SIZE)
    decode = backend.plan(AttentionBatch([1], [1], [[3]]))
    if make_backend is TorchAttentionBackend:  # the C kernel does not look at masked slots at all
        assert not decode.forward(0, torch.ones(1, HEADS, SIZE), one, one).isfinite().all()
    pool.clear([3])
    assert decode.forward(0, torch.ones(1, HEADS, SIZE), one, one).tolist() == [[1.0] * HEADS * SIZE]


@pytest.mark.parametrize("make_backend", BACKENDS)
def test_a_short_sequence_does_not_see_the_nan_of_a_longer_one_beside_it(make_backend):
    """Page tables of one call are filled up to the same length."""
    backend = make_backend(make_pool())
    long, nan = torch.ones(PAGE, KV_HEADS, SIZE), torch.full((1, KV_HEADS, SIZE), float("nan"))
    backend.plan(AttentionBatch([PAGE], [PAGE], [[0, 2]])).forward(0, torch.ones(PAGE, HEADS, SIZE), long, long)
    step = backend.plan(AttentionBatch([1, 1], [1, PAGE + 1], [[1], [0, 2]]))
    first_page_of_the_long_one = backend.pool.keys[0], backend.pool.values[0]
    for cache in first_page_of_the_long_one:
        cache[0] = float("nan")
    out = step.forward(0, torch.ones(2, HEADS, SIZE), torch.cat([long[:1], nan]), torch.cat([long[:1], nan]))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


def test_attention_does_not_grow_with_what_other_sequences_hold():
    """Rows of a step are this rank's own: nothing is padded to the number of rows of all ranks."""
    backend = TorchAttentionBackend(make_pool())
    step = backend.plan(AttentionBatch([1, 1, 5], [3, 9, 5], [[0], [1, 2, 3], [4, 5]]))
    assert [(group.first_row, group.query_len, tuple(group.pages.shape)) for group in step.groups] == [
        (0, 1, (2, 3)),
        (2, 5, (1, 2)),
    ]
    assert step.slots.tolist() == [2, 3 * PAGE, 16, 17, 18, 19, 20]


def test_the_pool_holds_what_the_configuration_counts():
    pool = make_pool()
    elements = sum(tensor.numel() for tensor in (*pool.keys, *pool.values))
    assert elements == MODEL.kv_elements_per_token * PAGES * PAGE
