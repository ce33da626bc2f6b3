"""What one rank does in the tests of peer memory. All ranks share GPU 0. Runs in the processes of `rank_processes`."""

import random
import sys
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import peer_memory_cases as cases
import pynccl_ranks
from nibble.distributed.communicator import PeerError
from nibble.distributed.peer_memory import PeerMemory, SegmentLayout, open_peer_memory
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack
from nibble.kernels.triton.compile_once import compile_once
from nibble.kernels.triton.fp8_row import leave_result
from nibble.kernels.triton.peer_combine import peer_combine
from nibble.kernels.triton.peer_dispatch import peer_dispatch
from nibble.kernels.triton.wire_row import quantize_pack as triton_quantize_pack
from rank_processes import Rank

DEVICE = pynccl_ranks.DEVICE
LAYOUT = WireRowLayout(2048, 8)
MAX_ROWS = 2048
INPUT_SCALE = torch.tensor(0.01)
LATE_S = 2.0
"""Longer than ranks that have met come after each other on busy cores."""
FEW_ROWS, MANY_ROWS = 8, 150
STRESS_GRAPHS, STEPS_OF_A_GRAPH = 12, 10
"""The most that a rank has in a step of the stress test; more than multiprocessors, so that programs take several."""


def join(
    rank: Rank, name: str, timeout_s: float = 30, max_rows: int = MAX_ROWS, fp8_partial: bool = False
) -> PeerMemory:
    """Through a group on the CPU that stays open, in `rank.state`."""
    group = SharedMemoryCommunicator(rank.rank, rank.world_size, rank.run_dir, name, 30)
    rank.state[f"cpu group {name}"] = group
    torch.cuda.set_device(DEVICE)
    compile_once()
    layout = SegmentLayout(max_rows, LAYOUT.row_bytes, LAYOUT.hidden_size, fp8_partial)
    return open_peer_memory(group, DEVICE, layout, timeout_s)


def shared(rank: Rank, fp8_partial: bool = False) -> PeerMemory:
    """The memory that most checks use, one after the other; that of bf16 results, or that of FP8 rows."""
    name = "shared-fp8" if fp8_partial else "shared"
    if name not in rank.state:
        rank.state[name] = join(rank, name, fp8_partial=fp8_partial)
    memory: PeerMemory = rank.state[name]
    return memory


def finish(memory: PeerMemory) -> None:
    torch.cuda.synchronize()
    memory.raise_failure()


class Step:
    """A layer's dispatch and combine, on inputs that stay where they are so that a graph can be captured."""

    def __init__(self, memory: PeerMemory, sizes: list[int]) -> None:
        self.memory, self.sizes = memory, sizes
        self.scale = INPUT_SCALE.to(DEVICE)
        self.rows = [tensor.to(DEVICE) for tensor in cases.rows_of(sizes, LAYOUT)[memory.rank]]
        self.partial = cases.partials_of(sizes, LAYOUT.hidden_size)[memory.rank].to(DEVICE)

    def run(self) -> list[Tensor]:
        gathered = peer_dispatch(self.memory, *self.rows, self.scale, self.sizes).clone()
        leave_result(self.partial, self.memory.partial(sum(self.sizes)))
        return [gathered, peer_combine(self.memory, self.sizes)]

    def change_inputs(self, seed: int) -> None:
        for tensor, new in zip(self.rows, cases.rows_of(self.sizes, LAYOUT, seed)[self.memory.rank], strict=True):
            tensor.copy_(new)
        self.partial.copy_(cases.partials_of(self.sizes, LAYOUT.hidden_size, seed)[self.memory.rank])

    def check(self, results: list[Tensor], seed: int) -> None:
        finish(self.memory)
        gathered, out = (result.cpu() for result in results)
        expected = [quantize_pack(*rows, INPUT_SCALE) for rows in cases.rows_of(self.sizes, LAYOUT, seed)]
        assert torch.equal(gathered, torch.cat(expected)), f"dispatch of {self.sizes}, seed {seed}"
        partials = cases.partials_of(self.sizes, LAYOUT.hidden_size, seed)
        partials = [cases.as_stored(self.memory, partial) for partial in partials]
        total = cases.sum_by_rank(partials).bfloat16().split(self.sizes)[self.memory.rank]
        assert torch.equal(out, total), f"combine of {self.sizes}, seed {seed}"


def check_steps(rank: Rank, distributions: list[list[int]]) -> None:
    memory = shared(rank)
    for sizes in distributions:
        step = Step(memory, sizes)
        for seed in range(2):
            step.change_inputs(seed)
            step.check(step.run(), seed)


def check_graphs(rank: Rank, distributions: list[list[int]], fp8_partial: bool = False) -> None:
    """One graph a distribution, all alive at once, replayed in turn on changing inputs, with eager steps between."""
    memory = shared(rank, fp8_partial)
    steps = [Step(memory, sizes) for sizes in distributions]
    for step in steps:
        step.run()
    finish(memory)
    check_in_turn(steps)


def check_in_turn(steps: Sequence[Any]) -> None:
    """Graphs of `Step`s, all alive at once, replayed in turn on changing inputs, with eager steps between."""
    captured = []
    for step in steps:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step.run()
        captured.append((graph, results))
    for seed in range(1, 5):
        for index, step in enumerate(steps):
            step.change_inputs(seed)
            graph, results = captured[index]
            if (index + seed) % 3:
                graph.replay()
            else:
                results = step.run()
            step.check(results, seed)


def check_closeness(rank: Rank, sizes: list[int]) -> dict[str, float]:
    """Mean error of the sum against fp64: through peer memory, by NCCL, and of bf16 numbers one after the other."""
    step = Step(shared(rank), sizes)
    partials = [partial.split(sizes)[rank.rank] for partial in cases.partials_of(sizes, LAYOUT.hidden_size)]
    truth = torch.stack(partials).double().sum(0)
    chain = partials[0]
    for partial in partials[1:]:
        chain = chain + partial
    _, out = step.run()
    finish(step.memory)
    with pynccl_ranks.join(rank.rank, rank.world_size, rank.run_dir, "closeness") as group:
        by_nccl = group.reduce_scatterv(step.partial, sizes)
        group.synchronize()
    results = {"peer": out, "nccl": by_nccl, "chain": chain}
    return {name: float((result.cpu().double() - truth).abs().mean()) for name, result in results.items()}


def wrong_values_of_many_steps(rank: Rank, steps: int) -> list[int]:
    """Wrong bytes of gathered rows and wrong sums, counted on the device. Nothing but the memory makes ranks meet.

    In most steps each rank has 0 to 8 rows of one of several inputs, in some up to 150. Single steps take turns with
    graphs of several. Some ranks' GPU work or host stops a while.
    """
    memory, world_size = shared(rank), rank.world_size
    same, own = random.Random(0), random.Random(rank.rank + 1)
    inputs = [StressInput(memory, seed) for seed in range(5)]
    wrong = torch.zeros(2, dtype=torch.int64, device=DEVICE)

    def take_a_step(pause: Callable[[], None]) -> None:
        most = MANY_ROWS if same.random() > 0.98 else FEW_ROWS
        same.choice(inputs).count_wrong([same.randrange(most + 1) for _ in range(world_size)], wrong, pause)

    take_a_step(lambda: None)
    finish(memory)
    graphs = [torch.cuda.CUDAGraph() for _ in range(STRESS_GRAPHS)]
    for graph in graphs:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(STEPS_OF_A_GRAPH):
                take_a_step(lambda: delay_gpu(own))
    turns = count(1)
    while steps > 0:
        if same.random() < 0.5:
            delay(own)
            same.choice(graphs).replay()
            steps -= STEPS_OF_A_GRAPH
        else:
            take_a_step(lambda: delay(own))
            steps -= 1
        if next(turns) % 100 == 0:
            finish(memory)  # so that launches do not run away from the device
    finish(memory)
    return [int(number) for number in wrong]


class StressInput:
    """Rows and results of all ranks, and what is to come of them, on the device."""

    def __init__(self, memory: PeerMemory, seed: int) -> None:
        self.memory = memory
        sizes = [MANY_ROWS] * memory.world_size
        self.scale = INPUT_SCALE.to(DEVICE)
        rows = [[x.to(DEVICE) for x in of_rank] for of_rank in cases.rows_of(sizes, LAYOUT, seed)]
        partials = [x.to(DEVICE) for x in cases.partials_of(sizes, LAYOUT.hidden_size, seed)]
        self.rows, self.partial = rows[memory.rank], partials[memory.rank]
        self.wire = [triton_quantize_pack(*of_rank, self.scale) for of_rank in rows]
        self.total = cases.sum_by_rank(partials).bfloat16()

    def count_wrong(self, sizes: list[int], wrong: Tensor, pause: Callable[[], None] = lambda: None) -> None:
        """One step; adds the wrong bytes of rows and the wrong sums to `wrong`, int64 [2]."""
        rank, num_rows = self.memory.rank, sum(sizes)
        start, size = sum(sizes[:rank]), sizes[rank]
        pause()
        gathered = peer_dispatch(self.memory, *(x[:size] for x in self.rows), self.scale, sizes)
        expected = torch.cat([of_rank[:rows_of_rank] for of_rank, rows_of_rank in zip(self.wire, sizes, strict=True)])
        wrong[0] += (gathered != expected).sum()
        pause()
        self.memory.partial(num_rows).copy_(self.partial[:num_rows])
        wrong[1] += (peer_combine(self.memory, sizes) != self.total[start : start + size]).sum()


def delay(generator: random.Random) -> None:
    """Of this rank's GPU work, or of its host."""
    delay_gpu(generator)
    if generator.random() < 0.01:
        time.sleep(generator.random() / 1000)


def delay_gpu(generator: random.Random) -> None:
    """Now and then, up to 50 µs or so."""
    if generator.random() < 0.2:
        torch.cuda._sleep(generator.randrange(100_000))


def come_too_late(rank: Rank, name: str, action: str) -> str:
    """The last rank comes when the others have given up. Returns this rank's message; the GPU stays usable."""
    memory = join(rank, name)
    step = Step(memory, [2] * rank.world_size)
    step.check(step.run(), 0)  # compiles, which takes longer than the others will wait
    launch: Callable[[], object] = step.run
    if action == "replay":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step.run()
        rank.state[f"graph {name}"] = graph, results
        launch = graph.replay
    rank.state[name] = memory
    memory.set_timeout(LATE_S)
    group = rank.state[f"cpu group {name}"]
    group.barrier()  # so that only one rank is late
    if rank.rank == rank.world_size - 1:
        group.barrier()
    launch()
    torch.cuda.synchronize()
    if rank.rank < rank.world_size - 1:
        group.barrier()
    assert torch.ones(8, device=DEVICE).sum().item() == 8, "the GPU is not usable any more"
    try:
        memory.raise_failure()
    except PeerError as error:
        return str(error)
    return "no failure"


def used_memory_after_rejoining(rank: Rank, times: int) -> list[int]:
    """MiB in use on the GPU each time that all ranks have joined, used and closed a memory of over 300 MiB each."""
    used = []
    for attempt in range(times):
        memory = join(rank, f"rejoining-{attempt}", max_rows=65536)
        step = Step(memory, [1] * rank.world_size)
        step.check(step.run(), 0)
        del step
        memory.close()
        group: SharedMemoryCommunicator = rank.state[f"cpu group rejoining-{attempt}"]
        group.barrier()
        free, total = torch.cuda.mem_get_info(DEVICE)
        used.append((total - free) >> 20)
        group.barrier()
        group.close()
    return used
