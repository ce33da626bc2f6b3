"""Paged attention through FlashInfer, on GPUs of compute capability 8.0 or newer.

Steps in which every sequence has one query run FlashInfer's decode on tensor cores, all others its prefill. FlashInfer
plans on the host, once a step, and compiles its kernels on first use, which takes about two minutes and is kept in its
cache.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch

from nibble.kernels.triton.kv_cache import store_kv
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.graph_places import GraphPlaces, GraphPlacesMemory
from nibble.utils.transfer import to_device

WORKSPACE_BYTES = 128 << 20  # what FlashInfer recommends; partial results of sequences that are shared out

int32 = partial(torch.tensor, dtype=torch.int32)


class FlashInferBackend:
    def __init__(self, pool: KvCachePool, num_heads: int, dtype: torch.dtype) -> None:
        """`num_heads` query heads of this rank; `dtype` is that of queries and results."""
        from flashinfer import (  # type: ignore[import-not-found]
            BatchDecodeWithPagedKVCacheWrapper,
            BatchPrefillWithPagedKVCacheWrapper,
        )

        self.pool = pool
        _, page_size, kv_heads, self._head_dim = pool.keys[0].shape
        self._shape = {
            "num_qo_heads": num_heads,
            "num_kv_heads": kv_heads,
            "page_size": page_size,
            "q_data_type": dtype,
            "kv_data_type": pool.keys[0].dtype,
        }
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._make_decode = partial(BatchDecodeWithPagedKVCacheWrapper, workspace, "NHD", use_tensor_cores=True)
        self._decode = self._make_decode()
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        self._graph_places = GraphPlacesMemory(pool.device)

    def plan(self, batch: AttentionBatch) -> "FlashInferStep":
        slots = to_device(batch.slots(self.pool.page_size), self.pool.device)
        if max(batch.query_lens) == 1:
            self._decode.plan(*self._pages(batch), head_dim=self._head_dim, **self._shape)
            return FlashInferStep(self.pool, self._decode, slots)
        first_queries = int32([0, *accumulate(batch.query_lens)])
        self._prefill.plan(first_queries, *self._pages(batch), head_dim_qk=self._head_dim, causal=True, **self._shape)
        return FlashInferStep(self.pool, self._prefill, slots)

    def graph_step(self, rows: int, max_pages: int) -> "FlashInferGraphStep":
        places = self._graph_places.places(rows, max_pages)
        wrapper = self._make_decode(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=places.first_pages,
            paged_kv_indices_buffer=places.pages,
            paged_kv_last_page_len_buffer=places.last_lens,
        )
        return FlashInferGraphStep(self.pool, wrapper, places, {"head_dim": self._head_dim, **self._shape})

    def _pages(self, batch: AttentionBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The batch's page lists, and the tokens in the last page of each sequence [B].

        All on the host, where FlashInfer plans, but the pages themselves, which it has no use for there.
        """
        size = self.pool.page_size
        first_pages, pages = batch.page_lists(size)
        last_lens = [(length - 1) % size + 1 for length in batch.seq_lens]
        return int32(first_pages), to_device(pages, self.pool.device, torch.int32), int32(last_lens)


class FlashInferStep:
    def __init__(self, pool: KvCachePool, wrapper: Any, slots: torch.Tensor) -> None:
        self.pool, self.wrapper, self.slots = pool, wrapper, slots

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        store_kv(k, v, self.slots, keys, values)
        return self.wrapper.run(q, (keys, values)).flatten(1)


class FlashInferGraphStep(FlashInferStep):
    """Decoding steps of a fixed number of sequences, whose places lie where the graph reads them."""

    def __init__(self, pool: KvCachePool, wrapper: Any, places: GraphPlaces, shape: dict[str, Any]) -> None:
        super().__init__(pool, wrapper, places.slots)
        self._places, self._shape = places, shape
        self._is_first = True

    def plan(self, batch: AttentionBatch) -> None:
        """FlashInfer's own `plan` looks at every sequence in Python, and copies what is there already; it is needed
        once, since it chooses the kernel.
        """
        from flashinfer.decode import fast_decode_plan  # type: ignore[import-not-found]

        places = batch.decoding_places(self.pool.page_size)
        self._places.fill(places)
        first_pages, last_lens = torch.from_numpy(places.first_pages), torch.from_numpy(places.last_lens)
        if self._is_first:
            self.wrapper.plan(first_pages, self._places.pages, last_lens, **self._shape)
            self._is_first = False
        else:
            fast_decode_plan(
                self.wrapper,
                first_pages,
                self._places.pages,
                last_lens,
                **self._shape,
                global_override_indptr_cpu=first_pages,
            )
