"""Compiles what the engine launches on GPUs, as it would there, without one.

    python test/kernels/compile_kernels.py 80 90 100

One line a kernel: what it takes of a GPU, and the constants that it is compiled for. The exit status is 1 if one does
not compile or takes more shared memory than there is. Registers are those of a thread; a stack are registers that did
not fit.
"""

import argparse
import importlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from engine_launches import COVERAGES, launch_all
from nibble.kernels.triton import nvfp4_tiles
from nibble.utils.process import die_with_parent_thread


@dataclass(frozen=True)
class Gpu:
    num_multiprocessors: int
    shared_memory: int  # bytes that a program can have


GPUS = {  # by compute capability: A100, RTX 4090, H100, B200 and RTX 5090
    80: Gpu(108, 163 << 10),
    89: Gpu(128, 99 << 10),
    90: Gpu(132, 227 << 10),
    100: Gpu(148, 227 << 10),
    120: Gpu(170, 99 << 10),
}


class CompileOnlyDriver:
    """What Triton and the engine ask of a driver before they launch. The GPU's number is its compute capability."""

    def __init__(self) -> None:
        self.arch = 0
        self.utils = self

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        gpu = GPUS[self.arch]
        return {"multiprocessor_count": gpu.num_multiprocessors, "max_shared_mem": gpu.shared_memory}


DRIVER = CompileOnlyDriver()


@dataclass(frozen=True)
class Launch:
    """A kernel, and what Triton compiles it for: types, alignments, constants and options, as JSON."""

    arch: int
    module: str
    name: str
    specialization: str

    @property
    def kernel(self) -> str:
        return f"{self.module.rpartition('.')[2]}.{self.name}"


@dataclass(frozen=True)
class Compiled:
    arch: int
    kernel: str
    constants: str
    error: str = ""
    num_warps: int = 0
    num_stages: int = 0
    shared_memory: int = 0
    registers: int = 0
    stack: int = 0


def launches_on(arch: int, coverage: str) -> list[Launch]:
    """Different ones, none of which is compiled or run."""
    found: dict[tuple[str, str], Launch] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[f"{fn.module}.{fn.name}", key] = Launch(arch, fn.module, fn.name, compile["specialization_data"])
        return True  # do not compile

    DRIVER.arch = arch
    nvfp4_tiles._device_property.cache_clear()
    knobs.runtime.jit_cache_hook = note
    launch_all(coverage)
    knobs.runtime.jit_cache_hook = None
    return list(found.values())


def compile_launch(launch: Launch) -> Compiled:
    DRIVER.arch = launch.arch
    function = getattr(importlib.import_module(launch.module), launch.name)
    constants = constants_of(launch, function.arg_names)
    try:
        with redirect_stdout(io.StringIO()):  # where Triton prints what it could not assemble
            kernel = function.preload(launch.specialization)
    except Exception as error:
        return Compiled(launch.arch, launch.kernel, constants, f"{type(error).__name__}: {error}")
    needed, available = kernel.metadata.shared, GPUS[launch.arch].shared_memory
    registers, stack = resources(next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin")))
    return Compiled(
        launch.arch,
        launch.kernel,
        constants,
        f"takes {needed} bytes of shared memory, and there are {available}" if needed > available else "",
        kernel.metadata.num_warps,
        kernel.metadata.num_stages,
        needed,
        registers,
        stack,
    )


def constants_of(launch: Launch, arguments: Sequence[str]) -> str:
    specialization = json.loads(launch.specialization)
    pairs = zip(specialization["constant_keys"], specialization["constant_vals"], strict=True)
    return " ".join(f"{arguments[place[0]]}={value}" for place, value in pairs)


def resources(cubin: str) -> tuple[int, int]:
    """Registers, and bytes of stack."""
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return int(registers), int(stack)


def compile_all(launches: Sequence[Launch]) -> Iterator[Compiled]:
    """In processes beside each other, which share what is imported."""
    with processes(os.cpu_count()) as pool:
        for launch, future in [(launch, pool.submit(compile_launch, launch)) for launch in launches]:
            try:
                yield future.result()
            except BrokenProcessPool:
                yield compile_alone(launch)


def compile_alone(launch: Launch) -> Compiled:
    """Once the compiler has crashed, which ends all that had not finished."""
    try:
        with processes(1) as pool:
            return pool.submit(compile_launch, launch).result()
    except BrokenProcessPool:
        return Compiled(launch.arch, launch.kernel, "", "crashes the compiler")


def processes(number: int | None) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, get_context("fork"), die_with_parent_thread)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "targets",
        type=target,
        nargs="+",
        metavar="ARCH[:COVERAGE]",
        help=f"one of {sorted(GPUS)}, and of {COVERAGES}, by default the last",
    )
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args()
    driver.set_active(DRIVER)
    launches = [launch for arch, coverage in args.targets for launch in launches_on(arch, coverage)]
    failures = 0
    if not args.json:
        print(f"{'arch':>4} {'kernel':34} {'warps':>5} {'stages':>6} {'shared':>7} {'regs':>5} {'stack':>5}")
    for compiled in compile_all(launches):
        failures += bool(compiled.error)
        print(json.dumps(asdict(compiled)) if args.json else as_line(compiled), flush=True)
    return 1 if failures else 0


def target(text: str) -> tuple[int, str]:
    arch, _, coverage = text.partition(":")
    coverage = coverage or COVERAGES[-1]
    if int(arch) not in GPUS or coverage not in COVERAGES:
        raise ValueError
    return int(arch), coverage


def as_line(compiled: Compiled) -> str:
    c = compiled
    line = (
        f"{c.arch:4} {c.kernel:34} {c.num_warps:5} {c.num_stages:6} {c.shared_memory:7} {c.registers:5} {c.stack:5}"
        f"  {c.constants}"
    )
    return f"{line}\n     {c.error}" if c.error else line


if __name__ == "__main__":
    sys.exit(main())
