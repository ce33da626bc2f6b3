"""Rank processes on the GPUs there are, as the engine shares them out.

Where there are more ranks than GPUs, start NVIDIA's Multi-Process Service first, or their kernels take turns.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nibble.distributed.pynccl import multi_rank_gpu_environment
from rank_processes import RankProcesses


@contextmanager
def gpu_ranks(world_size: int, paths: pytest.TempPathFactory, timeout_s: float = 60) -> Iterator[RankProcesses]:
    """With the environment that the engine gives its ranks. `timeout_s`: of one call."""
    with pytest.MonkeyPatch.context() as environment:
        ranks_per_gpu = -(-world_size // max(1, torch.cuda.device_count()))
        for name, value in multi_rank_gpu_environment(ranks_per_gpu).items():
            environment.setenv(name, value)
        with RankProcesses(world_size, paths.mktemp("ranks"), timeout_s) as processes:
            yield processes
