"""The seam between models and attention kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step. Rows of the step are theirs in order, `query_lens[i]` rows each.

    Sequence `i` attends causally to its first `seq_lens[i]` tokens, this step's included; they lie in
    `page_tables[i]`, which has at least `ceil(seq_lens[i] / page_size)` pages.
    """

    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    page_tables: Sequence[Sequence[int]]


class AttentionStep(Protocol):
    """Attention of one step, planned once and run by every layer."""

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k and v `[T, kv_heads, D]` in the cache; returns `[T, heads * D]` for q `[T, heads, D]`."""
        ...


class AttentionBackend(Protocol):
    def plan(self, batch: AttentionBatch) -> AttentionStep: ...
