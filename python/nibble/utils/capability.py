"""What this machine and this installation can run, asked in one place."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import cache

import psutil
import torch


@dataclass(frozen=True)
class Capability:
    """Facts about the machine."""

    cpu_cores: tuple[int, ...]
    """The cores that this process may use, by number."""
    num_gpus: int
    cuda_arch: tuple[int, int] | None
    """(major, minor) of the first GPU."""
    has_triton: bool
    has_flashinfer: bool
    can_compile_cuda: bool
    """Whether nvcc is at hand, which FlashInfer needs unless its compiled kernels are installed as well."""


@cache
def capability() -> Capability:
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Capability(
        cpu_cores=tuple(sorted(os.sched_getaffinity(0))),
        num_gpus=num_gpus,
        cuda_arch=torch.cuda.get_device_capability() if num_gpus else None,
        has_triton=importlib.util.find_spec("triton") is not None,
        has_flashinfer=importlib.util.find_spec("flashinfer") is not None,
        can_compile_cuda=_find_nvcc() is not None or importlib.util.find_spec("flashinfer_jit_cache") is not None,
    )


def _find_nvcc() -> str | None:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def available_memory_bytes() -> int:
    """Host memory that can be taken without swapping."""
    return int(psutil.virtual_memory().available)
