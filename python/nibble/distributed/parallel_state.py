"""This rank's place among the ranks, its device and its communicators."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import CPU, Communicator, SingleRankCommunicator


@dataclass(frozen=True)
class ParallelState:
    """`dp_group` joins the DP attention ranks, which are also the expert-parallel ranks (dp = ep = tp), on their
    device; `cpu_group` the same ranks for what the host has to know. On a CPU they are one.
    """

    rank: int
    dp_group: Communicator
    cpu_group: Communicator

    @property
    def device(self) -> torch.device:
        return self.dp_group.device

    @property
    def ep_rank(self) -> int:
        return self.rank

    @property
    def ep_size(self) -> int:
        return self.dp_group.world_size

    def local_experts(self, num_experts: int) -> range:
        """The global ids of the experts that this rank holds."""
        count = num_experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)


def initialize_parallel(config: EngineConfig, rank: int, run_dir: Path) -> ParallelState:
    """Meets the other ranks in `run_dir`. Blocks until all are there, at most --dist-timeout."""
    cpu_group = _create_cpu_group(config, rank, run_dir)
    if config.device == "cpu":
        return ParallelState(rank, cpu_group, cpu_group)
    # Neighbours share a GPU, so that every GPU has as many as the others or one less.
    device = torch.device("cuda", rank * config.num_gpus // config.parallel.world_size)
    torch.cuda.set_device(device)
    if cpu_group.world_size == 1:
        return ParallelState(rank, SingleRankCommunicator("dp", device), cpu_group)
    from nibble.distributed.pynccl import PyNcclCommunicator

    return ParallelState(rank, PyNcclCommunicator(cpu_group, "dp", config.args.dist_timeout, device), cpu_group)


def _create_cpu_group(config: EngineConfig, rank: int, run_dir: Path) -> Communicator:
    world_size, timeout = config.parallel.world_size, config.args.dist_timeout
    if world_size == 1 or config.model.moe is None:
        return SingleRankCommunicator("dp", CPU)  # ranks of a dense model have nothing to say to each other
    if config.cpu_collectives == "gloo":
        from nibble.distributed.gloo import GlooCommunicator

        return GlooCommunicator(rank, world_size, f"file://{run_dir}/gloo", name="dp", timeout_s=timeout)
    from nibble.distributed.shared_memory import SharedMemoryCommunicator

    return SharedMemoryCommunicator(rank, world_size, run_dir, name="dp", timeout_s=timeout)
