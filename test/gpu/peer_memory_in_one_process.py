"""All kernels of peer memory in one process, for compute-sanitizer; docs/peer_memory.md has the commands.

The ranks take turns on GPU 0, each with the flags of the others raised, and every byte and sum is checked. Ends with an
error if one is wrong.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import peer_memory_cases as cases
from nibble.distributed.communicator import PeerError
from nibble.distributed.peer_memory import PeerMemory, SegmentLayout
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack
from nibble.kernels.triton.fp8_row import leave_result
from nibble.kernels.triton.peer_combine import peer_combine, sum_over_hosts
from nibble.kernels.triton.peer_dispatch import peer_dispatch, peer_store

DEVICE = "cuda"
LAYOUTS = (WireRowLayout(7168, 8), WireRowLayout(304, 3))
SIZES = ([3], [0, 2], [1, 4, 2, 0], [2] * 8, [300, 1])
"""Rows per rank; 300 are more than a GPU's multiprocessors, so that programs take several."""
INPUT_SCALE = torch.tensor(0.01)


def take_a_step(ranks: list[PeerMemory], sizes: list[int], layout: WireRowLayout, seed: int) -> None:
    rows = cases.rows_of(sizes, layout, seed)
    gathered = []
    for memory, own in zip(ranks, rows, strict=True):
        cases.let_everybody_arrive(memory)
        gathered.append(peer_dispatch(memory, *(x.to(DEVICE) for x in own), INPUT_SCALE.to(DEVICE), sizes))
    wire = torch.cat([quantize_pack(*own, INPUT_SCALE) for own in rows])
    assert all(torch.equal(got.cpu(), wire) for got in gathered), f"dispatch of {sizes}"
    partials = cases.partials_of(sizes, layout.hidden_size, seed)
    for memory, partial in zip(ranks, partials, strict=True):
        leave_result(partial.to(DEVICE), memory.partial(len(partial)))
    total = cases.sum_by_rank([cases.as_stored(ranks[0], partial) for partial in partials]).bfloat16()
    for memory, expected in zip(ranks, total.split(sizes), strict=True):
        cases.let_everybody_arrive(memory)
        assert torch.equal(peer_combine(memory, sizes).cpu(), expected), f"combine of {sizes}"


def take_a_step_on_two_hosts(segment: SegmentLayout, sizes: list[int], layout: WireRowLayout) -> None:
    """The ranks of the first host; what the second one's bring is known."""
    size = len(sizes) // 2
    memories = cases.ranks_of_one_process(size, segment, DEVICE)
    wire = [quantize_pack(*own, INPUT_SCALE) for own in cases.rows_of(sizes, layout)]
    gathered = []
    for memory in memories:
        cases.let_everybody_arrive(memory)
        gathered.append(peer_store(memory, torch.cat(wire[memory.rank :: size]).to(DEVICE), sizes))
    assert all(torch.equal(got.cpu(), torch.cat(wire)) for got in gathered), f"rows of two hosts, {sizes}"
    partials = cases.partials_of(sizes, layout.hidden_size)
    for memory, partial in zip(memories, partials, strict=False):
        leave_result(partial.to(DEVICE), memory.partial(len(partial)))
    stored = [cases.as_stored(memories[0], partial) for partial in partials]
    hosts = [cases.sum_by_rank(stored[:size]).bfloat16(), cases.sum_by_rank(stored[size:]).bfloat16()]
    for memory in memories:
        cases.let_everybody_arrive(memory)
        sums = peer_combine(memory, sizes)
        assert torch.equal(sums.cpu(), torch.cat(hosts[0].split(sizes)[memory.rank :: size])), f"a host's sums, {sizes}"
        terms = [host.split(sizes)[memory.rank] for host in hosts]
        out = sum_over_hosts(torch.cat(terms).to(DEVICE), 2)
        assert torch.equal(out.cpu(), cases.sum_by_rank(terms).bfloat16()), f"sums of two hosts, {sizes}"


def wait_in_vain(memory: PeerMemory, sizes: list[int]) -> None:
    memory.set_timeout(0.01)
    cases.flags(memory).zero_()
    peer_combine(memory, sizes)
    torch.cuda.synchronize()
    try:
        memory.raise_failure()
    except PeerError:
        return
    raise AssertionError("a rank that does not come is not reported")


def main() -> None:
    for layout in LAYOUTS:
        for sizes in SIZES:
            for fp8_partial in (False, True):
                segment = SegmentLayout(sum(sizes), layout.row_bytes, layout.hidden_size, fp8_partial)
                ranks = cases.ranks_of_one_process(len(sizes), segment, DEVICE)
                for seed in range(2):
                    take_a_step(ranks, sizes, layout, seed)
                if len(sizes) > 1:
                    wait_in_vain(ranks[0], sizes)
                if len(sizes) % 2 == 0:
                    take_a_step_on_two_hosts(segment, sizes, layout)
    print("all rows and sums are right")


if __name__ == "__main__":
    main()
