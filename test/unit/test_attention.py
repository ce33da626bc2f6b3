"""Paged attention against plain attention in float64, for any mix of prompts, chunks and decoding sequences."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.config.model_config import MlaConfig, ModelConfig
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.cpu_backend import CpuAttentionBackend
from nibble.layers.attention.graph_places import GraphPlacesMemory
from nibble.layers.attention.torch_backend import TorchAttentionBackend

HEADS, KV_HEADS, SIZE, PAGE = 4, 2, 16, 4
SCALE = SIZE**-0.5
BACKENDS = (TorchAttentionBackend, CpuAttentionBackend)
PAGES = 64


SHAPE = {"num_layers": 2, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": SIZE}
MODEL = ModelConfig(
    **{**dict.fromkeys(ModelConfig.__dataclass_fields__, 0), "mla": None, "rope_scaling": None, **SHAPE}
)
LATENT = MlaConfig(None, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8, rope_interleave=True)
NO_VECTOR = replace(LATENT, kv_lora_rank=20, qk_rope_head_dim=6)
MLA_MODELS = {"latent": replace(MODEL, mla=LATENT), "latent, sizes of no whole vector": replace(MODEL, mla=NO_VECTOR)}


def make_pool(model: ModelConfig = MODEL, dtype: torch.dtype = torch.float32) -> KvCachePool:
    return KvCachePool(model, PAGES, PAGE, dtype, torch.device("cpu"))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of the last len(q) tokens of a sequence. q [Q, N, D], k [L, KV, D], v [L, KV, V]."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnd,lnd->nql", q, k) * scale
    length, queries = len(k), len(q)
    future = torch.arange(length) > torch.arange(length - queries, length)[:, None]
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("nql,lnd->qnd", weights, v).reshape(queries, -1)


sequences = st.lists(
    st.tuples(st.integers(0, 14), st.one_of(st.just(1), st.integers(1, 9))), min_size=1, max_size=6
).map(lambda items: sorted(items, key=lambda item: item[1] > 1))


def keys_and_values(model: ModelConfig, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    if model.mla:
        keys = torch.randn(length, 1, model.mla.cached_size, generator=generator)
        return keys, keys[..., : model.mla.kv_lora_rank]
    shape = (length, KV_HEADS, SIZE)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


lengths = st.lists(st.integers(1, 40), max_size=6)


@given(st.lists(lengths, min_size=1, max_size=3), st.sampled_from([1, 4, 16]), st.randoms(use_true_random=False))
def test_the_places_of_decoding_steps_are_those_of_the_batch_step_after_step(steps, page_size, random):
    """Also in the memory that graphs of all sizes share, where those of larger steps lie around."""
    memory = GraphPlacesMemory(torch.device("cpu"))
    graphs = {rows: memory.places(rows, 40 * rows) for rows in range(6, -1, -1)}
    for seq_lens in steps:
        tables = [[random.randrange(1000) for _ in range(-(-length // page_size) + 1)] for length in seq_lens]
        batch = AttentionBatch([1] * len(seq_lens), seq_lens, tables)
        graph = graphs[len(seq_lens)]
        graph.fill(batch.decoding_places(page_size))
        first_pages, pages = batch.page_lists(page_size)
        assert graph.seq_lens.tolist() == seq_lens
        assert graph.last_lens.tolist() == [(length - 1) % page_size + 1 for length in seq_lens]
        assert graph.first_pages.tolist() == first_pages
        assert graph.pages[: len(pages)].tolist() == pages
        assert graph.slots.tolist() == batch.slots(page_size)


@pytest.mark.parametrize("make_backend", BACKENDS)
@pytest.mark.parametrize("kind", ["grouped-query", *MLA_MODELS])
@settings(max_examples=40, deadline=None)
@given(items=sequences, seed=st.integers(0, 1000))
def test_any_mix_of_sequences_attends_to_its_own_past_only(make_backend, kind, items, seed):
    generator = torch.Generator().manual_seed(seed)
    model = MLA_MODELS.get(kind, MODEL)
    pool, scale = make_pool(model), 0.1 + 0.05 * (seed % 5)
    backend = make_backend(pool, scale)
    size = pool.keys[0].shape[-1]
    pages = torch.randperm(PAGES, generator=generator).tolist()
    tables, keys, values = [], [], []
    for past, queries in items:
        count = -(-(past + queries) // PAGE)
        tables.append([pages.pop() for _ in range(count)])
        k, v = keys_and_values(model, past + queries, generator)
        keys.append(k)
        values.append(v)
    layer = seed % 2
    for (past, _), table, k, v in zip(items, tables, keys, values, strict=True):
        if past:
            step = backend.plan(AttentionBatch([past], [past], [table]))
            step.forward(layer, torch.zeros(past, HEADS, size), k[:past], v[:past])
    lens = [queries for _, queries in items]
    q = torch.randn(sum(lens), HEADS, size, generator=generator)
    batch = AttentionBatch(lens, [past + queries for past, queries in items], tables)
    new = [torch.cat([x[past:] for (past, _), x in zip(items, tensors, strict=True)]) for tensors in (keys, values)]
    out = backend.plan(batch).forward(layer, q, *new)
    expected = [reference(*parts, scale) for parts in zip(q.split(lens), keys, values, strict=True)]
    torch.testing.assert_close(out.double(), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make_backend", BACKENDS)
def test_pages_of_a_failed_request_are_cleared_for_whoever_uses_them_next(make_backend):
    """Masked slots are multiplied by zero, and zero times NaN is NaN."""
    pool = make_pool()
    backend = make_backend(pool, SCALE)
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
    backend = make_backend(make_pool(), SCALE)
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
    backend = TorchAttentionBackend(make_pool(), SCALE)
    step = backend.plan(AttentionBatch([1, 1, 5], [3, 9, 5], [[0], [1, 2, 3], [4, 5]]))
    assert [(group.first_row, group.query_len, tuple(group.pages.shape)) for group in step.groups] == [
        (0, 1, (2, 3)),
        (2, 5, (1, 2)),
    ]
    assert step.slots.tolist() == [2, 3 * PAGE, 16, 17, 18, 19, 20]


@pytest.mark.parametrize("model", [MODEL, *MLA_MODELS.values()])
def test_the_pool_holds_what_the_configuration_counts(model):
    pool = make_pool(model)
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in (*pool.keys, *pool.values)}
    elements = sum(storage.nbytes() for storage in memory.values()) // 4
    assert elements == model.kv_elements_per_token * (PAGES + 1) * PAGE


def test_a_token_takes_one_row_of_latent_vector_and_rotated_key_a_layer():
    """Not keys and values of every head."""
    for model in MLA_MODELS.values():
        row = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
        assert model.kv_elements_per_token == 2 * row
        assert [keys[0, 0].numel() for keys in make_pool(model).keys] == [row, row]


@pytest.mark.parametrize("make_backend", BACKENDS)
@pytest.mark.parametrize("model", [MODEL, MLA_MODELS["latent"]])
def test_an_fp8_cache_holds_what_it_is_given_rounded_and_saturated(make_backend, model):
    pool = make_pool(model, torch.float8_e4m3fn)
    step = make_backend(pool, SCALE).plan(AttentionBatch([6], [6], [[5, 3]]))
    k, v = (300 * x for x in keys_and_values(model, 6, torch.Generator().manual_seed(0)))
    q = torch.ones(6, HEADS, k.shape[-1])
    k8, v8 = (x.clamp(-448, 448).to(torch.float8_e4m3fn).float() for x in (k, v))
    assert k.abs().max() > 448
    torch.testing.assert_close(step.forward(0, q, k, v).double(), reference(q, k8, v8, SCALE), atol=1e-3, rtol=1e-5)
    pool.clear([3, 5])
    assert not any(tensor.view(torch.uint8).any() for tensor in pool.tensors)
