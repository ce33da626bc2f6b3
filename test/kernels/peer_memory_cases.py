"""Ranks of peer memory that share one process: their segments are ordinary tensors.

Nothing runs beside anything else, so before a rank's turn the flags of all others are raised in its segment.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor

import wire_row_cases
from nibble.distributed.peer_memory import PeerMemory, SegmentLayout
from nibble.kernels.torch.fp8_row import dequantize_fp8_rows, leave_result, quantize_fp8_rows
from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.triton import peer_sync
from nibble.kernels.triton.peer_sync import FAILED, FLAGS, HEADER_BYTES, ROUND

ALWAYS = FAILED - 1  # a round that nobody reaches


def ranks_of_one_process(
    world_size: int, layout: SegmentLayout, device: str = "cpu", timeout_s: float = 30, first_rank: int = 0
) -> list[PeerMemory]:
    segments = [torch.full((layout.num_bytes,), 0xFF, dtype=torch.uint8, device=device) for _ in range(world_size)]
    for segment in segments:
        segment[:HEADER_BYTES] = 0
    addresses = [segment.data_ptr() for segment in segments]
    return [PeerMemory(rank, layout, segments[rank], addresses, timeout_s, first_rank) for rank in range(world_size)]


def flags(memory: PeerMemory) -> Tensor:
    """The newest round of each rank, as this rank sees it."""
    return memory.segment[:HEADER_BYTES].view(torch.int64)[FLAGS : FLAGS + memory.world_size]


def let_everybody_arrive(memory: PeerMemory) -> None:
    flags(memory).fill_(ALWAYS)


def rounds(memory: PeerMemory) -> int:
    """How many rounds this rank has been through."""
    return int(memory.segment[:HEADER_BYTES].view(torch.int64)[ROUND])


def rows_of(sizes: Sequence[int], layout: WireRowLayout, seed: int = 0) -> list[wire_row_cases.Rows]:
    return [wire_row_cases.random_rows(seed * 64 + rank, size, layout) for rank, size in enumerate(sizes)]


def partials_of(sizes: Sequence[int], hidden_size: int, seed: int = 0) -> list[Tensor]:
    """Every rank's partial results of all rows, which differ in size."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(sizes), sum(sizes), hidden_size
    return list((torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).exp()).bfloat16())


def store_partial(memory: PeerMemory, partial: Tensor) -> None:
    """As the experts do."""
    leave_result(partial, memory.partial(len(partial)))


def as_stored(memory: PeerMemory, partial: Tensor) -> Tensor:
    """What is left of a result on its way through the memory."""
    if not memory.layout.fp8_partial:
        return partial
    return dequantize_fp8_rows(quantize_fp8_rows(partial), partial.shape[1])


def sum_by_rank(partials: Sequence[Tensor]) -> Tensor:
    """In fp32, in the order of the ranks."""
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return total


def cut_off(x: Tensor) -> Tensor:
    """fp32 as bf16. Where compiled code rounds to the nearest, the interpreter cuts the rest off."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16()


TICKS = itertools.count()


@triton.jit
def load_acquire(ptr):
    return tl.atomic_add(ptr, 0, sem="acquire", scope="sys")


@triton.jit
def clock_ns(lane):
    return lane.to(tl.int64) * 0 + next(TICKS)


@contextmanager
def interpretable() -> Iterator[None]:
    """Without the two functions that are written in the GPU's own instructions."""
    with mock.patch.object(peer_sync, "load_acquire", load_acquire), mock.patch.object(peer_sync, "clock_ns", clock_ns):
        yield
