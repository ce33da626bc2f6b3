"""Latent attention (MLA) through FlashInfer: decoding and prompts by one kernel, straight from the latent rows."""

from functools import partial
from itertools import accumulate
from typing import Any

import torch

from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.flashinfer_backend import WORKSPACE_BYTES, int32
from nibble.utils.transfer import to_device


class FlashInferMlaBackend:
    def __init__(
        self, pool: KvCachePool, num_heads: int, kv_lora_rank: int, softmax_scale: float, dtype: torch.dtype
    ) -> None:
        """`num_heads` query heads of this rank; `dtype` is that of queries and results."""
        from flashinfer.mla import BatchMLAPagedAttentionWrapper  # type: ignore[import-not-found]

        self.pool, self.kv_lora_rank = pool, kv_lora_rank
        self._shape = {
            "num_heads": num_heads,
            "head_dim_ckv": kv_lora_rank,
            "head_dim_kpe": pool.keys[0].shape[-1] - kv_lora_rank,
            "page_size": pool.page_size,
            "causal": True,
            "sm_scale": softmax_scale,
            "q_data_type": dtype,
            "kv_data_type": pool.keys[0].dtype,
        }
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._make_wrapper = partial(BatchMLAPagedAttentionWrapper, workspace)
        self._wrapper = self._make_wrapper()
        self._graph_pages = torch.empty(0, dtype=torch.int32, device=pool.device)

    def plan(self, batch: AttentionBatch) -> "FlashInferMlaStep":
        self.plan_wrapper(self._wrapper, batch)
        slots = to_device(batch.slots(self.pool.page_size), self.pool.device)
        return FlashInferMlaStep(self, self._wrapper, slots)

    def graph_step(self, rows: int, max_pages: int) -> "FlashInferMlaGraphStep":
        """All graphs share the list of pages, so each is planned right before it is replayed."""
        if self._graph_pages.numel() < max_pages:
            self._graph_pages = torch.empty(max_pages, dtype=torch.int32, device=self.pool.device)
        wrapper = self._make_wrapper(
            use_cuda_graph=True,
            qo_indptr=self._graph_pages.new_empty(rows + 1),
            kv_indptr=self._graph_pages.new_empty(rows + 1),
            kv_indices=self._graph_pages,
            kv_len_arr=self._graph_pages.new_empty(rows),
        )
        return FlashInferMlaGraphStep(self, wrapper, torch.zeros(rows, dtype=torch.int64, device=self.pool.device))

    def plan_wrapper(self, wrapper: Any, batch: AttentionBatch) -> None:
        first_pages, pages = batch.page_lists(self.pool.page_size)
        wrapper.plan(
            qo_indptr=int32([0, *accumulate(batch.query_lens)]),
            kv_indptr=int32(first_pages),
            kv_indices=to_device(pages, self.pool.device, torch.int32),
            kv_len_arr=int32(list(batch.seq_lens)),
            **self._shape,
        )


class FlashInferMlaStep:
    def __init__(self, backend: FlashInferMlaBackend, wrapper: Any, slots: torch.Tensor) -> None:
        self.backend, self.wrapper, self.slots = backend, wrapper, slots

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pool, rank = self.backend.pool, self.backend.kv_lora_rank
        pool.write(layer, self.slots, k, v)
        latents = pool.keys[layer].squeeze(2)  # [pages, page_size, kv_lora_rank + rope]
        out = self.wrapper.run(q[..., :rank], q[..., rank:], latents[..., :rank], latents[..., rank:])
        return out.flatten(1)


class FlashInferMlaGraphStep(FlashInferMlaStep):
    """Decoding steps of a fixed number of sequences, whose pages and slots are copied to where the graph reads them."""

    def plan(self, batch: AttentionBatch) -> None:
        self.backend.plan_wrapper(self.wrapper, batch)
        self.slots.copy_(torch.tensor(batch.slots(self.backend.pool.page_size)), non_blocking=True)
