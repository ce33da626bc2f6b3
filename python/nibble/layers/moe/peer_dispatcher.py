"""Carries rows to the experts and the sums back through memory that all ranks map: one kernel each way.

Where the ranks are on several hosts, that memory is of the ranks of one. Then rows and sums take a collective, too,
over this rank's rail: the ranks that have its place on each host. A row crosses the network once to each other host.

Steps with more rows than that memory holds take the collectives, both ways; every rank sees the same sizes and does the
same. Sums are those of `peer_combine` in either dispatcher, so with and without FP4 the bits are the same.
"""

from dataclasses import replace

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import Communicator
from nibble.distributed.peer_memory import PeerMemory
from nibble.kernels.torch.wire_row import UnpackedRows, unpack
from nibble.kernels.triton.fp8_row import leave_result
from nibble.kernels.triton.peer_combine import peer_combine, peer_meet, sum_over_hosts
from nibble.kernels.triton.peer_dispatch import peer_dispatch, peer_store
from nibble.kernels.triton.rail import rail_sizes
from nibble.layers.dp_attention import get_dp_global_num_tokens
from nibble.layers.moe.combiner import Combiner
from nibble.layers.moe.token_dispatcher import AllGatherDispatcher, Fp4AllGatherDispatcher, GatheredRows


class PeerCombiner:
    """The experts leave their results where all ranks read them, and each rank sums those of its own rows."""

    def __init__(self, memory: PeerMemory, collectives: Combiner, rail: Communicator | None = None) -> None:
        """`collectives` combines what the memory does not hold; `rail` reaches the other hosts, if there are any."""
        self.memory, self.collectives, self.rail = memory, collectives, rail

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
        sums = peer_combine(self.memory, sizes)  # [S, H] -> [T, H], or of the rail
        if self.rail is None:
            return sums
        terms = self.rail.all_to_allv(sums, rail_sizes(self.memory, sizes))  # of each host, [N * T, H]
        return sum_over_hosts(terms, self.rail.world_size)


class PeerMemoryDispatcher(Fp4AllGatherDispatcher):
    """Quantizes to NVFP4 into every rank's memory."""

    def __init__(self, config: EngineConfig, top_k: int, combiner: PeerCombiner) -> None:
        super().__init__(config, top_k, combiner)
        self.memory, self.rail = combiner.memory, combiner.rail

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> UnpackedRows:
        sizes = get_dp_global_num_tokens()
        if not self.memory.fits(sum(sizes)):
            return super().dispatch(x, topk_ids, topk_weights)
        assert self.input_scale is not None
        if self.rail is None:
            all_rows = peer_dispatch(self.memory, x, topk_ids, topk_weights, self.input_scale, sizes)  # [S, R]
        else:
            rows = self.quantize_pack(x, topk_ids, topk_weights, self.input_scale)  # [T, R]
            all_rows = peer_store(self.memory, self.rail.all_gatherv(rows, rail_sizes(self.memory, sizes)), sizes)
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
