"""What this machine and this installation can run, asked in one place."""

import importlib.util
import os
from dataclasses import dataclass
from functools import cache

import psutil
import torch


@dataclass(frozen=True)
class Capability:
    """Facts about the machine; `cuda_arch` is (major, minor) of device 0, None without CUDA."""

    cpu_cores: tuple[int, ...]
    """The cores that this process may use, by number."""
    cuda_arch: tuple[int, int] | None
    has_triton: bool
    has_flashinfer: bool


@cache
def capability() -> Capability:
    return Capability(
        cpu_cores=tuple(sorted(os.sched_getaffinity(0))),
        cuda_arch=torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
        has_triton=importlib.util.find_spec("triton") is not None,
        has_flashinfer=importlib.util.find_spec("flashinfer") is not None,
    )


def available_memory_bytes() -> int:
    """Host memory that can be taken without swapping."""
    return int(psutil.virtual_memory().available)
