"""What one rank does in the tests of peer memory inside several hosts. Neighbours play a host."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import peer_memory_cases as cases
import pynccl_ranks
from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import SingleRankCommunicator
from nibble.distributed.parallel_state import ParallelState
from nibble.distributed.peer_memory import PeerMemory, SegmentLayout, open_peer_memory_of_hosts
from nibble.distributed.pynccl import PyNcclCommunicator
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from nibble.kernels.torch.wire_row import quantize_pack
from nibble.kernels.triton.compile_once import compile_once
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.layers.moe.combiner import make_combiner
from nibble.layers.moe.peer_dispatcher import PeerCombiner, PeerMemoryDispatcher
from peer_memory_ranks import DEVICE, INPUT_SCALE, LAYOUT, MAX_ROWS, check_in_turn, finish
from rank_processes import Rank


class OnHost:
    """One rank's way to its host's memory and to the other hosts."""

    def __init__(self, rank: Rank, num_hosts: int, fp8_partial: bool) -> None:
        size = rank.world_size // num_hosts
        host, place = divmod(rank.rank, size)
        name = f"{num_hosts}-hosts{'-fp8' if fp8_partial else ''}"
        torch.cuda.set_device(DEVICE)
        compile_once()
        self.on_host = SharedMemoryCommunicator(place, size, rank.run_dir, f"{name}-host{host}", 30)
        self.all_hosts = SharedMemoryCommunicator(rank.rank, rank.world_size, rank.run_dir, f"{name}-all", 30)
        layout = SegmentLayout(MAX_ROWS, LAYOUT.row_bytes, LAYOUT.hidden_size, fp8_partial)
        self.memory: PeerMemory = open_peer_memory_of_hosts(self.on_host, self.all_hosts, DEVICE, layout, 30)
        self.rail: PyNcclCommunicator = pynccl_ranks.join(host, num_hosts, rank.run_dir, f"{name}-rail{place}")
        self.num_hosts, self.rank = num_hosts, rank.rank
        config = SimpleNamespace(
            args=SimpleNamespace(moe_combine_dtype="fp8" if fp8_partial else "bf16"),
            model=SimpleNamespace(hidden_size=LAYOUT.hidden_size),
            dtype="bfloat16",
            kernels="triton",
            moe_kernel="triton",
        )
        combiner = PeerCombiner(self.memory, make_combiner(cast(EngineConfig, config)), self.rail)
        self.dispatcher = PeerMemoryDispatcher(cast(EngineConfig, config), LAYOUT.top_k, combiner)
        self.dispatcher.input_scale = INPUT_SCALE.to(DEVICE)

    def finish(self) -> None:
        self.rail.synchronize()
        finish(self.memory)


def shared(rank: Rank, num_hosts: int, fp8_partial: bool = False) -> OnHost:
    name = f"{num_hosts} hosts, fp8 {fp8_partial}"
    if name not in rank.state:
        rank.state[name] = OnHost(rank, num_hosts, fp8_partial)
    place: OnHost = rank.state[name]
    return place


class Step:
    """A layer's dispatch and combine, on inputs that stay where they are so that a graph can be captured."""

    def __init__(self, place: OnHost, sizes: list[int]) -> None:
        self.place, self.sizes = place, sizes
        self.rows = [tensor.to(DEVICE) for tensor in cases.rows_of(sizes, LAYOUT)[place.rank]]
        self.partial = cases.partials_of(sizes, LAYOUT.hidden_size)[place.rank].to(DEVICE)

    def run(self) -> list[Tensor]:
        group, alone = self.place.all_hosts, SingleRankCommunicator("alone")
        state = ParallelState(self.place.rank, group, alone, alone, group, group, ep_size=group.world_size)
        with dp_step(DpStep(state, tuple(self.sizes), tuple(self.sizes))):
            self.place.dispatcher.dispatch(*self.rows)  # type: ignore[arg-type]
            gathered = self.place.memory.rows(sum(self.sizes), LAYOUT.row_bytes).clone()
            return [gathered, self.place.dispatcher.combine(self.partial)]

    def change_inputs(self, seed: int) -> None:
        for tensor, new in zip(self.rows, cases.rows_of(self.sizes, LAYOUT, seed)[self.place.rank], strict=True):
            tensor.copy_(new)
        self.partial.copy_(cases.partials_of(self.sizes, LAYOUT.hidden_size, seed)[self.place.rank])

    def check(self, results: list[Tensor], seed: int) -> None:
        self.place.finish()
        gathered, out = (result.cpu() for result in results)
        expected = [quantize_pack(*rows, INPUT_SCALE) for rows in cases.rows_of(self.sizes, LAYOUT, seed)]
        assert torch.equal(gathered, torch.cat(expected)), f"dispatch of {self.sizes}, seed {seed}"
        assert torch.equal(out, self.total(seed)), f"combine of {self.sizes}, seed {seed}"

    def total(self, seed: int) -> Tensor:
        """Each host's sum in fp32, rounded; then theirs."""
        memory = self.place.memory
        stored = [
            cases.as_stored(memory, partial) for partial in cases.partials_of(self.sizes, LAYOUT.hidden_size, seed)
        ]
        size = memory.world_size
        hosts = [stored[first : first + size] for first in range(0, len(stored), size)]
        total = cases.sum_by_rank([cases.sum_by_rank(host).bfloat16() for host in hosts])
        return total.bfloat16().split(self.sizes)[self.place.rank]


def check_steps(rank: Rank, num_hosts: int, distributions: list[list[int]], fp8_partial: bool = False) -> None:
    """Eager, then one graph a distribution, all alive at once, replayed in turn on changing inputs."""
    place = shared(rank, num_hosts, fp8_partial)
    steps = [Step(place, sizes) for sizes in distributions]
    for step in steps:
        step.check(step.run(), 0)
    check_in_turn(steps)


def errors_of_sums(rank: Rank, num_hosts: int, sizes: list[int]) -> dict[str, float]:
    """Mean error against fp64: by way of the hosts' sums, by NCCL, and of bf16 numbers one after the other."""
    step = Step(shared(rank, num_hosts), sizes)
    partials = [partial.split(sizes)[rank.rank] for partial in cases.partials_of(sizes, LAYOUT.hidden_size)]
    truth = torch.stack(partials).double().sum(0)
    chain = partials[0]
    for partial in partials[1:]:
        chain = chain + partial
    _, out = step.run()
    step.place.finish()
    group = pynccl_ranks.shared(rank)
    by_nccl = group.reduce_scatterv(step.partial, sizes)
    group.synchronize()
    results = {"hosts": out, "nccl": by_nccl, "chain": chain}
    return {name: float((result.cpu().double() - truth).abs().mean()) for name, result in results.items()}
