"""Kernels that start while the one before them still runs, on GPUs of compute capability 9.0 or newer.

A chain of kernels, each of which reads what the one before it wrote, waits at every link for the last program to end,
for the next kernel to start and for its first loads. "Programmatic dependent launch" takes the start out of that. The
first kernel of a chain is launched as any other; each later one with ``launch_pdl=overlaps_predecessor()``, right after
the one before it and on the same stream. A kernel then

1. does what needs nothing of its predecessor: its inputs from outside of the chain are there;
2. calls `wait_for_predecessor`, in every program, before it reads what another kernel of the chain writes, and before
   it writes anything: memory that it is about to write may be in use until then;
3. calls `let_successor_start` after that, so that a kernel starts when all but its direct predecessor have ended.

Elsewhere, and interpreted, all this is nothing.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq


@triton.constexpr_function
def overlaps_predecessor() -> bool:
    """Whether the current device can."""
    return not triton.knobs.runtime.interpret and bool(cuda_capability_geq(9))


@triton.jit
def wait_for_predecessor():
    """Until the kernel before has ended, and what it wrote can be read."""
    if overlaps_predecessor():
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_successor_start():
    """The next kernel starts once every program has called this or ended, where there is room for it."""
    if overlaps_predecessor():
        tl.extra.cuda.gdc_launch_dependents()
