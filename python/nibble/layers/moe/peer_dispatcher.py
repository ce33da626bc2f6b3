"""Carries rows to the experts and the sums back through memory that all ranks map: one kernel each way.

Steps with more rows than that memory holds take the collectives, both ways; every rank sees the same sizes and does the
same. Sums are those of `peer_combine` in either dispatcher, so with and without FP4 the bits are the same.
"""

from dataclasses import replace

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.peer_memory import PeerMemory
from nibble.kernels.torch.wire_row import UnpackedRows, unpack
from nibble.kernels.triton.fp8_row import leave_result
from nibble.kernels.triton.peer_combine import peer_combine, peer_meet
from nibble.kernels.triton.peer_dispatch import peer_dispatch
from nibble.layers.dp_attention import get_dp_global_num_tokens
from nibble.layers.moe.combiner import Combiner
from nibble.layers.moe.token_dispatcher import AllGatherDispatcher, Fp4AllGatherDispatcher, GatheredRows


class PeerCombiner:
    """The experts leave their results where all ranks read them, and each rank sums those of its own rows."""

    def __init__(self, memory: PeerMemory, collectives: Combiner) -> None:
        """`collectives` combines what the memory does not hold."""
        self.memory, self.collectives = memory, collectives

    def out(self, rows: torch.Tensor) -> torch.Tensor | None:
        num_rows = sum(get_dp_global_num_tokens())
        return self.memory.partial(num_rows) if self.memory.fits(num_rows) else self.collectives.out(rows)

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        sizes = get_dp_global_num_tokens()
        if not self.memory.fits(sum(sizes)):
            return self.collectives.combine(partial)
        own = self.memory.partial(sum(sizes))
        if partial.data_ptr() != own.data_ptr():
            leave_result(partial, own)
        return peer_combine(self.memory, sizes)  # [S, H] -> [T, H]


class PeerMemoryDispatcher(Fp4AllGatherDispatcher):
    """Quantizes to NVFP4 into every rank's memory."""

    def __init__(self, config: EngineConfig, top_k: int, combiner: PeerCombiner) -> None:
        super().__init__(config, top_k, combiner)
        self.memory = combiner.memory

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> UnpackedRows:
        sizes = get_dp_global_num_tokens()
        if not self.memory.fits(sum(sizes)):
            return super().dispatch(x, topk_ids, topk_weights)
        assert self.input_scale is not None
        all_rows = peer_dispatch(self.memory, x, topk_ids, topk_weights, self.input_scale, sizes)  # [S, R]
        return replace(unpack(all_rows, self.layout), out=self.combiner.out(all_rows))


class PeerCombineDispatcher(AllGatherDispatcher):
    """Gathers the activations as they are, by the collective; only sums go through the memory."""

    def __init__(self, combiner: PeerCombiner) -> None:
        super().__init__(combiner)
        self.memory = combiner.memory

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> GatheredRows:
        sizes = get_dp_global_num_tokens()
        if self.memory.fits(sum(sizes)) and any(sizes):
            peer_meet(self.memory)  # all have read the last results; the gather does not wait for ranks without rows
        return super().dispatch(x, topk_ids, topk_weights)
