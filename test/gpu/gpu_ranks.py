"""Rank processes that share the GPU. Start NVIDIA's Multi-Process Service first, or their kernels take turns."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nibble.distributed.pynccl import multi_rank_gpu_environment
from rank_processes import RankProcesses


@contextmanager
def gpu_ranks(world_size: int, paths: pytest.TempPathFactory, timeout_s: float = 60) -> Iterator[RankProcesses]:
    """With the environment that the engine gives its ranks. `timeout_s`: of one call."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in multi_rank_gpu_environment(world_size).items():
            environment.setenv(name, value)
        with RankProcesses(world_size, paths.mktemp("ranks"), timeout_s) as processes:
            yield processes
