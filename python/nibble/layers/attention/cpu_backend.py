"""Paged attention on a CPU: decoding sequences in C, straight from their pages; prompts in torch."""

import ctypes

import torch

from nibble.kernels.cpu.library import address, c_kernels
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.attention.torch_backend import SequenceGroup, TorchAttentionBackend, TorchAttentionStep

_HEAD_SIZES = 16  # kernels.c reads heads of a multiple of this, and writes as much past the last score


class CpuAttentionBackend(TorchAttentionBackend):
    def plan(self, batch: AttentionBatch) -> "CpuAttentionStep":
        return CpuAttentionStep(self, *self.plan_groups(batch))


class CpuAttentionStep(TorchAttentionStep):
    def attend(self, layer: int, group: SequenceGroup, q: torch.Tensor) -> torch.Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        _, page_size, kv_heads, size = keys.shape
        if group.query_len > 1 or q.dtype != torch.float32 or size % _HEAD_SIZES:
            return super().attend(layer, group, q)
        batch, pages = group.pages.shape
        rows = q[group.first_row : group.first_row + batch].contiguous()
        out = torch.empty(batch, rows.shape[1] * size)
        scratch = (ctypes.c_float * (pages * page_size + _HEAD_SIZES))()
        c_kernels().decode_attention(
            address(rows), address(keys), address(values), address(group.pages), pages, address(group.seq_lens),
            batch, rows.shape[1], kv_heads, size, page_size, scratch, address(out),
        )  # fmt: skip
        return out
