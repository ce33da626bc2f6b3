"""The seam between models and attention kernels."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step. Rows of the step are theirs in order, `query_lens[i]` rows each.

    Sequence `i` attends causally to its first `seq_lens[i]` tokens, this step's included; they lie in
    `page_tables[i]`, which has at least `ceil(seq_lens[i] / page_size)` pages. Tables that are `array("i")` are the
    quickest to gather.
    """

    query_lens: Sequence[int]
    seq_lens: Sequence[int]
    page_tables: Sequence[Sequence[int]]

    def slots(self, page_size: int) -> list[int]:
        """Where the keys and values of the step's rows go: `page * page_size + offset` of each."""
        return [
            table[position // page_size] * page_size + position % page_size
            for query_len, seq_len, table in zip(self.query_lens, self.seq_lens, self.page_tables, strict=True)
            for position in range(seq_len - query_len, seq_len)
        ]

    def page_lists(self, page_size: int) -> tuple[list[int], list[int]]:
        """Where the pages of each of the B sequences begin, and end, [B + 1], and the pages of all, one list."""
        counts = [-(-length // page_size) for length in self.seq_lens]
        tables = (table[:count] for table, count in zip(self.page_tables, counts, strict=True))
        return [0, *accumulate(counts)], list(chain.from_iterable(tables))

    def decoding_places(self, page_size: int) -> "DecodingPlaces":
        """Of a batch in which every sequence has one row."""
        seq_lens = np.array(self.seq_lens, dtype=np.int32)
        counts = -(-seq_lens // page_size)
        first_pages = np.zeros(len(seq_lens) + 1, dtype=np.int32)
        np.cumsum(counts, out=first_pages[1:])
        pages = np.frombuffer(b"".join(map(_beginning, self.page_tables, counts.tolist())), np.int32)
        last_lens = (seq_lens - 1) % page_size + 1
        slots = pages[first_pages[1:] - 1].astype(np.int64) * page_size + last_lens - 1
        return DecodingPlaces(seq_lens, first_pages, pages, last_lens, slots)


def _beginning(table: Sequence[int], count: int) -> "array[int]":
    if len(table) > count:
        table = table[:count]
    return table if isinstance(table, array) else array("i", table)


class DecodingPlaces(NamedTuple):
    """Where the tokens of B sequences lie, for kernels that read pages."""

    seq_lens: NDArray[np.int32]  # [B]
    first_pages: NDArray[np.int32]  # [B + 1], where the pages of each sequence begin, and end
    pages: NDArray[np.int32]  # of all sequences
    last_lens: NDArray[np.int32]  # [B], tokens in the last page of each
    slots: NDArray[np.int64]  # [B], `AttentionBatch.slots`


class AttentionStep(Protocol):
    """Attention of one step, planned once and run by every layer."""

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Stores k `[T, kv_heads, D]` and v `[T, kv_heads, V]` in the cache; returns `[T, heads * V]` for q
        `[T, heads, D]`.

        D and V are equal but for MLA: one key head, and values that are the first V elements of the keys. All products
        of queries and keys are multiplied by the model's `softmax_scale`.
        """
        ...


class AttentionBackend(Protocol):
    def plan(self, batch: AttentionBatch) -> AttentionStep: ...


class GraphAttentionStep(AttentionStep, Protocol):
    """Attention of decoding steps of a fixed number of rows: a CUDA graph may capture `forward`.

    What differs from step to step lies in memory that stays where it is.
    """

    def plan(self, batch: AttentionBatch) -> None:
        """Refreshes that memory for a batch of exactly so many sequences with one query each; not to be captured."""
        ...


class GraphAttentionBackend(AttentionBackend, Protocol):
    """A backend whose decoding steps CUDA graphs can capture."""

    def graph_step(self, rows: int, max_pages: int) -> GraphAttentionStep:
        """For `rows` sequences that have at most `max_pages` pages together."""
        ...
