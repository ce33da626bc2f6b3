"""Paged attention in torch, on any device: the reference for the others."""

from dataclasses import dataclass
from itertools import chain, groupby

import torch
import torch.nn.functional as F

from nibble.kv_cache.pool import KvCachePool, gather_pages
from nibble.layers.attention.backend import AttentionBatch
from nibble.utils.transfer import to_device


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences of equal query length, attended to in one call. B sequences of Q queries over L slots."""

    first_row: int
    query_len: int
    pages: torch.Tensor  # [B, P]
    seq_lens: torch.Tensor  # [B]

    def mask(self, num_slots: int, heads_per_kv_head: int) -> torch.Tensor:
        """[B, 1, G * Q, L] or [B, 1, 1, L], True where a query may look."""
        # Query j of a sequence is its token seq_len - query_len + j.
        device = self.seq_lens.device
        last = self.seq_lens[:, None] - self.query_len + torch.arange(self.query_len, device=device)  # [B, Q]
        mask = torch.arange(num_slots, device=device) <= last[:, :, None]  # [B, Q, L]
        return (mask.repeat(1, heads_per_kv_head, 1) if self.query_len > 1 else mask)[:, None]


class TorchAttentionBackend:
    """Gathers each sequence's pages and calls scaled_dot_product_attention."""

    def __init__(self, pool: KvCachePool, softmax_scale: float) -> None:
        self.pool, self.softmax_scale = pool, softmax_scale

    def plan(self, batch: AttentionBatch) -> "TorchAttentionStep":
        return TorchAttentionStep(self, *self.plan_groups(batch))

    def plan_groups(self, batch: AttentionBatch) -> tuple[torch.Tensor, list[SequenceGroup]]:
        """The slots of the new tokens, and the groups: neighbours with one query (decode) form one, every other
        sequence its own.
        """
        groups, first, row = [], 0, 0
        for is_decode, run in groupby(batch.query_lens, key=lambda length: length == 1):
            lengths = list(run)
            count = len(lengths) if is_decode else 1
            for start in range(first, first + len(lengths), count):
                groups.append(self._group(batch, row, range(start, start + count)))
                row += sum(batch.query_lens[start : start + count])
            first += len(lengths)
        return to_device(batch.slots(self.pool.page_size), self.pool.device), groups

    def _group(self, batch: AttentionBatch, first_row: int, members: range) -> SequenceGroup:
        seq_lens = [batch.seq_lens[i] for i in members]
        width = -(-max(seq_lens) // self.pool.page_size)
        tables = [batch.page_tables[i][:width] for i in members]
        # Filled up with a page of its own: masked slots are multiplied by zero, and a neighbour's NaN would stay NaN.
        pages = [[*table, *[table[0]] * (width - len(table))] for table in tables]
        device = self.pool.device
        return SequenceGroup(
            first_row,
            batch.query_lens[members.start],
            to_device(list(chain.from_iterable(pages)), device).view(len(pages), width),
            to_device(seq_lens, device),
        )


class TorchAttentionStep:
    def __init__(self, backend: TorchAttentionBackend, slots: torch.Tensor, groups: list[SequenceGroup]) -> None:
        self.pool, self.softmax_scale = backend.pool, backend.softmax_scale
        self.slots = slots
        self.groups = groups

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.store(layer, k, v)
        outputs = [self.attend(layer, group, q) for group in self.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        self.pool.write(layer, self.slots, k, v)

    def attend(self, layer: int, group: SequenceGroup, q: torch.Tensor) -> torch.Tensor:
        sequences, queries = group.pages.shape[0], group.query_len
        rows = q[group.first_row : group.first_row + sequences * queries]
        keys, values = (
            gather_pages(cache[layer], group.pages.flatten()).unflatten(0, group.pages.shape).to(q.dtype)
            for cache in (self.pool.keys, self.pool.values)
        )  # [B, P, page_size, kv_heads, D], of values V
        _, pages, page_size, kv_heads, size = keys.shape
        # The heads that share a key head become queries of it: nothing is repeated.
        grouped = rows.view(sequences, queries, kv_heads, -1, size).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            grouped.flatten(2, 3),  # [B, kv_heads, G * Q, D]
            keys.flatten(1, 2).transpose(1, 2),  # [B, kv_heads, L, D]
            values.flatten(1, 2).transpose(1, 2),
            attn_mask=group.mask(pages * page_size, grouped.shape[2]),
            scale=self.softmax_scale,
        )
        out = out.unflatten(2, (-1, queries)).permute(0, 3, 1, 2, 4)  # [B, Q, kv_heads, G, V]
        return out.reshape(sequences * queries, -1)
