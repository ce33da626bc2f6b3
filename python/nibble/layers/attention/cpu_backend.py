"""Paged attention on a CPU: decoding sequences in C, straight from their pages; prompts in torch."""

from collections.abc import Sequence

import torch

from nibble.kernels.cpu.library import c_kernels
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.torch_backend import SequenceGroup, TorchAttentionBackend, TorchAttentionStep

_LANES = 16  # of vector.h: what C reads and writes is a multiple of it
_ITEMSIZES = (2, 4)  # of the caches that C reads: bf16 and fp32

_SHORT_PROMPT = 64
"""Queries up to which the C loops are faster than gathering pages for a matrix product, measured on a Xeon."""


class CpuAttentionBackend(TorchAttentionBackend):
    def plan(self, batch: AttentionBatch) -> "CpuAttentionStep":
        return CpuAttentionStep(self, *self.plan_groups(_one_by_one(batch)))


def _one_by_one(batch: AttentionBatch) -> AttentionBatch:
    """The queries of short prompts as sequences of their own, which end where the query stands."""
    if max(batch.query_lens) == 1:
        return batch
    query_lens: list[int] = []
    seq_lens: list[int] = []
    tables: list[Sequence[int]] = []
    for queries, length, table in zip(batch.query_lens, batch.seq_lens, batch.page_tables, strict=True):
        is_short = queries <= _SHORT_PROMPT
        query_lens += [1] * queries if is_short else [queries]
        seq_lens += range(length - queries + 1, length + 1) if is_short else [length]
        tables += [table] * (queries if is_short else 1)
    return AttentionBatch(query_lens, seq_lens, tables)


class CpuAttentionStep(TorchAttentionStep):
    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        rows, heads, size = k.shape
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        in_order = k.stride()[1:] == v.stride()[1:] == (size, 1)
        is_plain = k.dtype == torch.float32 and in_order and not self.pool.values_are_in_keys
        if not is_plain or heads * size % _LANES or keys.itemsize not in _ITEMSIZES:
            return super().store(layer, k, v)
        c_kernels().store_kv(
            k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), rows, heads * size, self.slots.data_ptr(),
            keys.data_ptr(), values.data_ptr(), keys.itemsize,
        )  # fmt: skip

    def attend(self, layer: int, group: SequenceGroup, q: torch.Tensor) -> torch.Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        (_, page_size, kv_heads, size), value_size = keys.shape, values.shape[-1]
        is_plain = q.dtype == torch.float32 and keys.itemsize in _ITEMSIZES
        if group.query_len > 1 or not is_plain or size % _LANES or value_size % _LANES:
            return super().attend(layer, group, q)
        (batch, pages), heads = group.pages.shape, q.shape[1]
        rows = q[group.first_row : group.first_row + batch].contiguous()
        out = torch.empty(batch, heads * value_size)
        c_kernels().decode_attention(
            rows.data_ptr(), keys.data_ptr(), values.data_ptr(),
            group.pages.data_ptr(), pages, group.seq_lens.data_ptr(),
            batch, heads, kv_heads, size, value_size, self.softmax_scale, page_size, keys.itemsize, out.data_ptr(),
        )  # fmt: skip
        return out
