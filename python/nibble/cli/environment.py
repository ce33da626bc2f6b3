"""`nibble env`: what this machine and this installation are, and what they lack for what."""

import argparse
import importlib.metadata
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import nibble

if TYPE_CHECKING:
    from nibble.utils.capability import Capability

_PACKAGES = (
    "torch", "transformers", "tokenizers", "triton", "flashinfer-python", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
    "xgrammar", "fastapi", "uvicorn", "pyzmq", "msgspec",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nibble.utils.capability import capability  # imports torch

    machine = capability()
    rows = [*_versions(), *_devices(machine), *_missing(machine)]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


def _versions() -> list[tuple[str, str]]:
    rows = [("nibble", nibble.__version__), ("Python", platform.python_version()), ("system", platform.platform())]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return rows


def _devices(machine: "Capability") -> list[tuple[str, str]]:
    import torch

    from nibble.utils.capability import available_memory_bytes

    rows = [
        ("CPU", f"{_cpu_name()}, {len(machine.cpu_cores)} cores may be used"),
        ("memory", f"{available_memory_bytes() / 2**30:.1f} GiB available"),
        ("C compiler", shutil.which("cc") or shutil.which("gcc") or "none"),
        ("CUDA of PyTorch", torch.version.cuda or "none"),
    ]
    for index in range(machine.num_gpus):
        properties = torch.cuda.get_device_properties(index)
        arch = f"compute capability {properties.major}.{properties.minor}"
        rows.append((f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {arch}"))
    if machine.num_gpus:
        rows.append(("NCCL of PyTorch", ".".join(map(str, torch.cuda.nccl.version()))))  # type: ignore[no-untyped-call]
    return rows


def _missing(machine: "Capability") -> list[tuple[str, str]]:
    """One row for each thing that can't be done here, with what it takes."""
    from nibble.config.resolve import OLDEST_CUDA_ARCH, OLDEST_FP4_ARCH

    on_gpu = machine.cuda_arch is not None and machine.cuda_arch >= OLDEST_CUDA_ARCH
    has_compiler = shutil.which("cc") or shutil.which("gcc")
    lacking = [
        ("C kernels and shared memory on CPUs", has_compiler, "a C compiler on the PATH (cc or gcc)"),
        ("GPUs", on_gpu, "a GPU of compute capability 8.0 or newer and a PyTorch with CUDA"),
        ("GPU kernels", not on_gpu or machine.has_triton, "pip install triton"),
        (
            "FP4 tensor cores",
            machine.cuda_arch is not None and machine.cuda_arch >= OLDEST_FP4_ARCH and machine.has_flashinfer,
            "a GPU of compute capability 10.0 or newer and pip install 'nibble[cuda13]'",
        ),
    ]
    rows = [(f"missing for {purpose}", remedy) for purpose, has, remedy in lacking if not has]
    return rows or [("missing", "nothing")]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
