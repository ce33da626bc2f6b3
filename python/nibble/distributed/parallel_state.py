"""This rank's place among the ranks, and its communicator."""

from dataclasses import dataclass
from pathlib import Path

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import Communicator, SingleRankCommunicator


@dataclass(frozen=True)
class ParallelState:
    """`dp_group` joins the DP attention ranks, which are also the expert-parallel ranks (dp = ep = tp)."""

    rank: int
    dp_group: Communicator

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
    return ParallelState(rank, _create_communicator(config, rank, run_dir))


def _create_communicator(config: EngineConfig, rank: int, run_dir: Path) -> Communicator:
    world_size, timeout = config.parallel.world_size, config.args.dist_timeout
    if world_size == 1 or config.model.moe is None:
        return SingleRankCommunicator("dp")  # ranks of a dense model have nothing to say to each other
    if config.cpu_collectives == "gloo":
        from nibble.distributed.gloo import GlooCommunicator

        return GlooCommunicator(rank, world_size, f"file://{run_dir}/gloo", name="dp", timeout_s=timeout)
    from nibble.distributed.shared_memory import SharedMemoryCommunicator

    return SharedMemoryCommunicator(rank, world_size, run_dir, name="dp", timeout_s=timeout)
