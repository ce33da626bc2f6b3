"""This rank's place among the ranks, its device and its communicators."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import CPU, Communicator, SingleRankCommunicator
from nibble.utils.errors import ConfigError

if TYPE_CHECKING:
    from nibble.distributed.between_nodes import BetweenNodes
    from nibble.distributed.peer_memory import PeerMemory
    from nibble.distributed.pynccl import PyNcclCommunicator

logger = logging.getLogger(__name__)

PEER_PATIENCE = 0.8
"""Of --dist-timeout: kernels that wait in peer memory say who is missing before NCCL, which can't, gives up."""


@dataclass(frozen=True)
class ParallelState:
    """Whom this rank meets, on its device. Groups of the same ranks are one object.

    Sizes and places are those of the communicators, so that a size never meets another group's collective:

    - `tp_group`: all ranks that take part in a forward pass;
    - `attn_tp_group`: the ranks that share this rank's requests and split the attention heads;
    - `dense_tp_group`: those that split the dense layers of a model with experts: `attn_tp_group`, or this rank alone;
    - `dp_group`: of every attention group the rank that has this rank's place in it;
    - `cpu_group`: the ranks of `tp_group`, for what the host has to know.

    Where attention groups never meet (dense models), each is a world of its own: a `dp_group` of one rank.
    """

    rank: int
    tp_group: Communicator
    attn_tp_group: Communicator
    dense_tp_group: Communicator
    dp_group: Communicator
    cpu_group: Communicator
    ep_size: int = 1
    peer_memory: "PeerMemory | None" = None
    """What carries the experts' rows between the ranks of `tp_group`, or those of this host; None leaves it to the
    group.
    """
    rail_group: Communicator | None = None
    """Beside `peer_memory` of one of several hosts: the ranks that have this rank's place on each of them."""
    between_nodes: "BetweenNodes | None" = None
    """Where ranks of several hosts meet, if they do."""

    @property
    def device(self) -> torch.device:
        return self.tp_group.device

    @property
    def moe_tp_size(self) -> int:
        """Ranks over which the width of an expert is split."""
        return self.tp_group.world_size // self.ep_size

    @property
    def ep_rank(self) -> int:
        return self.tp_group.rank // self.moe_tp_size

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_group.rank % self.moe_tp_size

    def local_experts(self, num_experts: int) -> range:
        """The global ids of the experts that this rank holds, or a part of their width."""
        count = num_experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)


def initialize_parallel(config: EngineConfig, rank: int, run_dir: Path) -> ParallelState:
    """Meets the other ranks: those of its node in `run_dir`, all others at --dist-init-addr.

    Blocks until all are there, at most --dist-timeout.
    """
    sizes = config.parallel
    attn_tp, alone = sizes.attn_tp_ranks(rank), range(rank, rank + 1)
    if sizes.groups_meet:
        tp, dp = range(sizes.world_size), range(rank - attn_tp.start, sizes.world_size, sizes.attn_tp_size)
    else:
        tp, dp = attn_tp, alone
    meeting = _Meeting(config, rank, run_dir)
    state = ParallelState(
        rank,
        tp_group=meeting.join("tp", tp),
        attn_tp_group=meeting.join("attn_tp", attn_tp),
        dense_tp_group=meeting.join("attn_tp", alone if config.args.moe_dense_tp_size == 1 else attn_tp),
        dp_group=meeting.join("dp", dp),
        cpu_group=meeting.join_on_cpu("tp", tp),
        ep_size=sizes.ep_size,
        between_nodes=meeting.between_nodes if sizes.nnodes > 1 and sizes.groups_meet else None,
    )
    memory = meeting.open_peer_memory("tp", tp) if config.moe_comm_backend == "peer" else None
    if memory is None:
        return state
    rail = meeting.join_rail(state.tp_group) if sizes.nnodes > 1 else None
    return replace(state, peer_memory=memory, rail_group=rail)


def moe_comm_backend(config: EngineConfig, state: ParallelState) -> str | None:
    """What was resolved, or what --moe-comm-backend auto has to take where peer memory can't be reached."""
    return "nccl" if config.moe_comm_backend == "peer" and state.peer_memory is None else config.moe_comm_backend


class _Meeting:
    """Joins the groups of one rank. All ranks join theirs in the same order."""

    def __init__(self, config: EngineConfig, rank: int, run_dir: Path) -> None:
        self.config, self.rank, self.run_dir = config, rank, run_dir
        self.device = CPU
        if config.device == "cuda":
            # Neighbours share a GPU, so that every GPU has as many as the others or one less.
            index = config.parallel.index_on_node(rank) * config.num_gpus // config.parallel.ranks_per_node
            self.device = torch.device("cuda", index)
            torch.cuda.set_device(self.device)
        self._on_cpu: dict[tuple[int, ...], Communicator] = {}
        self._on_gpu: dict[tuple[int, ...], Communicator] = {}

    def join(self, name: str, members: Sequence[int]) -> Communicator:
        """The group of `members`, this rank among them, on the device."""
        if self.device == CPU:
            return self.join_on_cpu(name, members)
        key = tuple(members)
        if key not in self._on_gpu:
            self._on_gpu[key] = self._join_on_gpu(name, members)
        return self._on_gpu[key]

    def join_on_cpu(self, name: str, members: Sequence[int]) -> Communicator:
        key = tuple(members)
        if key not in self._on_cpu:
            self._on_cpu[key] = self._join_on_cpu(name, members)
        return self._on_cpu[key]

    def join_rail(self, all_ranks: Communicator) -> Communicator:
        """Its GPU group, which ends with that of all ranks."""
        rail = self.join("rail", self.config.parallel.rail(self.rank))
        cast("PyNcclCommunicator", all_ranks).take_along(cast("PyNcclCommunicator", rail))
        return rail

    def open_peer_memory(self, name: str, members: Sequence[int]) -> "PeerMemory | None":
        """That of `members`, or of those on this host, watched by their group on the GPU; None if --moe-comm-backend
        auto has to do without, on all hosts alike.
        """
        from nibble.distributed.peer_memory import (
            PeerMemoryUnavailable,
            open_peer_memory,
            open_peer_memory_of_hosts,
            segment_layout,
        )

        group, args = cast("PyNcclCommunicator", self.join(name, members)), self.config.args
        parallel = self.config.parallel
        layout, patience_s = segment_layout(self.config), PEER_PATIENCE * args.dist_timeout
        on_cpu = self.join_on_cpu(name, members)
        try:
            if parallel.nnodes == 1:
                memory = open_peer_memory(on_cpu, group.device, layout, patience_s)
            else:
                host = self.join_on_cpu("host", parallel.ranks_of_node(parallel.node_of(self.rank)))
                memory = open_peer_memory_of_hosts(host, on_cpu, group.device, layout, patience_s)
        except PeerMemoryUnavailable as error:
            if args.moe_comm_backend == "peer":
                raise ConfigError(f"--moe-comm-backend peer: {error}; use nccl or auto") from error
            if self.rank == 0:
                logger.warning("rows go to the experts and back through NCCL; no peer memory: %s", error)
            return None
        if self.rank == 0:
            where = "" if parallel.nnodes == 1 else " inside each host, and NCCL between them"
            size = layout.num_bytes >> 20
            logger.info("peer memory%s: %d MiB a rank, for steps of %d rows", where, size, layout.max_rows)
        group.watch(memory.raise_failure)
        return memory

    def _join_on_gpu(self, name: str, members: Sequence[int]) -> Communicator:
        if len(members) == 1:
            return SingleRankCommunicator(name, self.device)
        from nibble.distributed.pynccl import PyNcclCommunicator

        bootstrap = self.join_on_cpu(name, members)
        return PyNcclCommunicator(bootstrap, name, self.config.args.dist_timeout, self.device)

    def _join_on_cpu(self, name: str, members: Sequence[int]) -> Communicator:
        rank, size, timeout = members.index(self.rank), len(members), self.config.args.dist_timeout
        if size == 1:
            return SingleRankCommunicator(name, CPU)
        address = f"{name}{members[0]}"  # several groups of one kind meet at the same place
        parallel = self.config.parallel
        if len({parallel.node_of(member) for member in members}) > 1:
            return self.between_nodes.join(name, address, members)
        if self.config.cpu_collectives == "gloo":
            from nibble.distributed.gloo import GlooCommunicator

            return GlooCommunicator(rank, size, f"file://{self.run_dir}/gloo-{address}", name, timeout)
        from nibble.distributed.shared_memory import SharedMemoryCommunicator

        return SharedMemoryCommunicator(
            rank, size, self.run_dir, address, timeout, ranks_on_host=parallel.ranks_per_node
        )

    @cached_property
    def between_nodes(self) -> "BetweenNodes":
        """Opened with the first group that spans nodes, which every rank has if any does: that of all ranks."""
        from nibble.distributed.between_nodes import BetweenNodes

        return BetweenNodes(self.config, self.rank)
