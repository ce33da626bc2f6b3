"""Latent attention (MLA) by a Triton kernel in decoding steps, by PyTorch in steps with prompts.

For GPUs that several ranks share, where FlashInfer's kernel hangs, and for sizes that it does not have.
"""

import torch

from nibble.kernels.triton.latent_attention import latent_decode
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch, AttentionStep
from nibble.layers.attention.graph_places import GraphPlaces, GraphPlacesMemory
from nibble.layers.attention.torch_backend import TorchAttentionBackend
from nibble.utils.transfer import to_device


class TritonMlaBackend:
    def __init__(self, pool: KvCachePool, kv_lora_rank: int, softmax_scale: float) -> None:
        self.pool, self.kv_lora_rank, self.softmax_scale = pool, kv_lora_rank, softmax_scale
        self._prompts = TorchAttentionBackend(pool, softmax_scale)
        self._graph_places = GraphPlacesMemory(pool.device)

    def plan(self, batch: AttentionBatch) -> AttentionStep:
        if max(batch.query_lens) > 1:
            return self._prompts.plan(batch)
        device = self.pool.device
        first_pages, pages = (
            to_device(values, device, torch.int32) for values in batch.page_lists(self.pool.page_size)
        )
        seq_lens = to_device(batch.seq_lens, device, torch.int32)
        return TritonMlaStep(self, first_pages, pages, seq_lens, to_device(batch.slots(self.pool.page_size), device))

    def graph_step(self, rows: int, max_pages: int) -> "TritonMlaGraphStep":
        return TritonMlaGraphStep(self, self._graph_places.places(rows, max_pages))


class TritonMlaStep:
    """One query of each of T sequences."""

    def __init__(
        self,
        backend: TritonMlaBackend,
        first_pages: torch.Tensor,  # int32 [T + 1]
        pages: torch.Tensor,  # int32, of all sequences
        seq_lens: torch.Tensor,  # int32 [T]
        slots: torch.Tensor,  # int64 [T]
    ) -> None:
        self.backend = backend
        self.first_pages, self.pages, self.seq_lens, self.slots = first_pages, pages, seq_lens, slots

    def forward(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        backend, pool = self.backend, self.backend.pool
        pool.write(layer, self.slots, k, v)
        return latent_decode(
            q,
            pool.keys[layer],
            self.first_pages,
            self.pages,
            self.seq_lens,
            backend.kv_lora_rank,
            backend.softmax_scale,
        )


class TritonMlaGraphStep(TritonMlaStep):
    """Decoding steps of a fixed number of sequences, whose places lie where the graph reads them."""

    def __init__(self, backend: TritonMlaBackend, places: GraphPlaces) -> None:
        super().__init__(backend, places.first_pages, places.pages, places.seq_lens, places.slots)
        self._places = places

    def plan(self, batch: AttentionBatch) -> None:
        self._places.fill(batch.decoding_places(self.backend.pool.page_size))
