"""What one rank does in the tests of PyNCCL; ranks share the GPUs there are. Runs in processes of `rank_processes`."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from communicator_ranks import GATHER_DTYPES, assert_own_memory, failure_of, random_rows, rows_for
from nibble.distributed.communicator import SUMMABLE_DTYPES
from nibble.distributed.pynccl import PyNcclCommunicator
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from rank_processes import Rank

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # pytest's process has none
DEVICE = torch.device("cuda", RANK * torch.cuda.device_count() // WORLD_SIZE)


def join(rank: int, world_size: int, run_dir: Path, name: str, timeout_s: float = 30) -> PyNcclCommunicator:
    torch.cuda.set_device(DEVICE)  # graphs are captured on the current one
    with SharedMemoryCommunicator(rank, world_size, run_dir, name, timeout_s) as bootstrap:
        return PyNcclCommunicator(bootstrap, name, timeout_s, DEVICE)


def shared(rank: Rank) -> PyNcclCommunicator:
    """The group of all ranks that most checks use, one after the other."""
    if "group" not in rank.state:
        rank.state["group"] = join(rank.rank, rank.world_size, rank.run_dir, "shared")
    group: PyNcclCommunicator = rank.state["group"]
    return group


def integers(seed: int, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sums of eight are exact in every dtype but int8, where they wrap around."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return torch.randint(0, 30, shape, generator=generator).to(dtype)


def assert_bits(group: PyNcclCommunicator, actual: Tensor, expected: Tensor, what: str) -> None:
    group.synchronize()
    assert (actual.dtype, actual.shape, actual.device) == (expected.dtype, expected.shape, DEVICE), what
    octets = [x.cpu().reshape(-1).view(torch.uint8) for x in (actual, expected)]
    assert torch.equal(*octets), f"{what}: got {actual}, expected {expected}"


def check_gathers(rank: Rank, distributions: list[list[int]]) -> None:
    group = shared(rank)
    for sizes in distributions:
        for seed, dtype in enumerate(GATHER_DTYPES):
            inputs = [random_rows(seed, r, (size, 3, 5), dtype) for r, size in enumerate(sizes)]
            own = inputs[rank.rank].to(DEVICE)
            gathered = group.all_gatherv(own, sizes)
            assert_own_memory(gathered, own)
            assert_bits(group, gathered, torch.cat(inputs), f"all_gatherv {dtype} {sizes}")
            assert_bits(group, own, inputs[rank.rank], f"the input of all_gatherv {dtype} {sizes}")
            if len(set(sizes)) == 1:
                assert_bits(group, group.all_gather(own), torch.cat(inputs), f"all_gather {dtype} {sizes}")


def check_list_gathers(rank: Rank, distributions: list[list[int]]) -> None:
    group = shared(rank)
    kinds: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((4096,), torch.uint8), ((), torch.float32), ((2, 3), torch.bfloat16), ((0,), torch.int32),
        ((5,), torch.float8_e4m3fn), ((1,), torch.int64),
    ]  # fmt: skip
    for sizes in distributions:
        inputs = [
            [random_rows(seed, r, (size, *width), dtype) for r, size in enumerate(sizes)]
            for seed, (width, dtype) in enumerate(kinds)
        ]
        gathered = group.all_gatherv([parts[rank.rank].to(DEVICE) for parts in inputs], sizes)
        for result, parts, kind in zip(gathered, inputs, kinds, strict=True):
            assert_bits(group, result, torch.cat(parts), f"all_gatherv of a list, {kind} {sizes}")


def check_exact_sums(rank: Rank, distributions: list[list[int]]) -> None:
    group = shared(rank)
    for sizes in distributions:
        for seed, dtype in enumerate(SUMMABLE_DTYPES):
            inputs = [integers(seed, r, (sum(sizes), 7), dtype) for r in range(rank.world_size)]
            total = torch.stack(inputs).to(torch.int64).sum(0).to(dtype)
            mine = total.split(sizes)[rank.rank]
            own = inputs[rank.rank].to(DEVICE)
            assert_bits(group, group.reduce_scatterv(own, sizes), mine, f"reduce_scatterv {dtype} {sizes}")
            assert_bits(group, group.all_reduce(own), total, f"all_reduce {dtype} {sizes}")
            if len(set(sizes)) == 1:
                assert_bits(group, group.reduce_scatter(own), mine, f"reduce_scatter {dtype} {sizes}")
            assert_bits(group, own, inputs[rank.rank], f"the input of the sums of {dtype}")


def check_rounded_sums(rank: Rank, rows: int) -> None:
    """Each of the W - 1 additions, in any order, may round by half an ulp of what it adds up."""
    group = shared(rank)
    sizes = [rows + 3 * r for r in range(rank.world_size)]
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        generators = [torch.Generator().manual_seed(seed * 100 + r) for r in range(rank.world_size)]
        terms = torch.stack([torch.randn(sum(sizes), 513, generator=g).to(dtype) for g in generators])
        total, bound = terms.double().sum(0), rank.world_size * torch.finfo(dtype).eps * terms.double().abs().sum(0)
        own = terms[rank.rank].to(DEVICE)
        reduced, scattered = group.all_reduce(own), group.reduce_scatterv(own, sizes)
        copies = group.all_gather(reduced[None])
        group.synchronize()
        assert ((reduced.cpu().double() - total).abs() <= bound).all(), f"all_reduce {dtype}"
        assert all(torch.equal(copy, reduced) for copy in copies), f"the ranks have different sums of {dtype}"
        error = (scattered.cpu().double() - total.split(sizes)[rank.rank]).abs()
        assert (error <= bound.split(sizes)[rank.rank]).all(), f"reduce_scatterv {dtype}"


def check_all_to_alls(rank: Rank, distributions: list[list[int]]) -> None:
    group = shared(rank)
    for sizes in distributions:
        for seed, dtype in enumerate((torch.uint8, torch.bfloat16)):
            inputs = [random_rows(seed, r, (sum(sizes), 48), dtype) for r in range(rank.world_size)]
            own = inputs[rank.rank].to(DEVICE)
            result = group.all_to_allv(own, sizes)
            assert_bits(group, result, rows_for(rank.rank, inputs, sizes), f"all_to_allv {dtype} {sizes}")
            assert_bits(group, own, inputs[rank.rank], f"the input of all_to_allv {dtype} {sizes}")


def check_broadcasts(rank: Rank) -> None:
    group = shared(rank)
    for src in range(rank.world_size):
        for seed, dtype in enumerate(GATHER_DTYPES):
            for shape in ((), (0, 3), (40, 511)):
                inputs = [random_rows(seed, r, shape, dtype) for r in range(rank.world_size)]
                own = inputs[rank.rank].to(DEVICE)
                group.broadcast(own, src)
                assert_bits(group, own, inputs[src], f"broadcast {dtype} {shape} from {src}")


def check_ring(rank: Rank) -> None:
    """Everybody sends to the next rank and receives from the one before."""
    group = shared(rank)
    count = rank.world_size
    before, after = (rank.rank - 1) % count, (rank.rank + 1) % count
    for seed, dtype in enumerate(GATHER_DTYPES):
        own = random_rows(seed, rank.rank, (33, 7), dtype).to(DEVICE)
        received = torch.empty_like(own)
        for step in range(2):
            if rank.rank % 2 == step:
                group.send(own, after)
            else:
                group.recv(received, before)
        assert_bits(group, received, random_rows(seed, before, (33, 7), dtype), f"recv {dtype}")


def check_barriers(rank: Rank) -> None:
    """Nobody leaves a barrier before everybody has entered it."""
    group = shared(rank)
    for step in range(5):
        (rank.run_dir / f"entered-{step}-{rank.rank}").touch()
        group.barrier()
        assert len(list(rank.run_dir.glob(f"entered-{step}-*"))) == rank.world_size


class Step:
    """The collectives of one MoE layer and a few more, on inputs that stay in place."""

    def __init__(self, group: PyNcclCommunicator, sizes: list[int]) -> None:
        self.group, self.sizes = group, sizes
        self.inputs = [x.to(DEVICE) for x in self._inputs_of(group.rank, seed=0)]

    def _inputs_of(self, rank: int, seed: int) -> list[Tensor]:
        size, total = self.sizes[rank], sum(self.sizes)
        rows, marks = random_rows(seed, rank, (size, 176), torch.uint8), random_rows(seed, rank, (size,), torch.int64)
        return [rows, marks, integers(seed, rank, (total, 64), torch.bfloat16)]

    def run(self) -> list[Tensor]:
        rows, marks, partial = self.inputs
        copy = partial.clone()
        self.group.broadcast(copy, src=self.group.world_size - 1)
        return [
            self.group.all_gatherv(rows, self.sizes),
            *self.group.all_gatherv([rows, marks], self.sizes),
            self.group.reduce_scatterv(partial, self.sizes),
            self.group.all_to_allv(partial, self.sizes),
            self.group.all_reduce(partial),
            copy,
        ]

    def change_inputs(self, seed: int) -> None:
        for x, new in zip(self.inputs, self._inputs_of(self.group.rank, seed), strict=True):
            x.copy_(new)

    def expected(self, seed: int) -> list[Tensor]:
        everybody = [self._inputs_of(rank, seed) for rank in range(self.group.world_size)]
        rows, marks, partials = (list(parts) for parts in zip(*everybody, strict=True))
        total = torch.stack(partials).float().sum(0).bfloat16()
        mine = total.split(self.sizes)[self.group.rank]
        exchanged = rows_for(self.group.rank, partials, self.sizes)
        return [torch.cat(rows), torch.cat(rows), torch.cat(marks), mine, exchanged, total, partials[-1]]


def capture(run: Callable[[], Any], group: PyNcclCommunicator) -> tuple[torch.cuda.CUDAGraph, Any]:
    run()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = run()
    return graph, outputs


def check_graphs(rank: Rank, distributions: list[list[int]]) -> None:
    """One graph a distribution, all alive at once, replayed in turn on changing inputs."""
    group = shared(rank)
    steps = [Step(group, sizes) for sizes in distributions]
    captured = [capture(step.run, group) for step in steps]
    for seed in range(1, 4):
        for step, (graph, outputs) in zip(steps, captured, strict=True):
            step.change_inputs(seed)
            graph.replay()
            for index, (output, expected) in enumerate(zip(outputs, step.expected(seed), strict=True)):
                assert_bits(group, output, expected, f"output {index} of replay {seed} with {step.sizes}")


def use_two_groups(rank: Rank) -> None:
    """Four ranks in a grid: rows and columns talk in turn."""
    row, column = divmod(rank.rank, 2)
    with (
        join(column, 2, rank.run_dir, f"row-{row}") as by_row,
        join(row, 2, rank.run_dir, f"column-{column}") as by_column,
    ):
        own = torch.tensor([rank.rank], device=DEVICE)
        for _ in range(5):
            results = [by_row.all_gather(own), by_row.all_reduce(own), by_column.all_gather(own)]
            by_row.synchronize()
            by_column.synchronize()
            assert [x.tolist() for x in results] == [[2 * row, 2 * row + 1], [4 * row + 1], [column, column + 2]]


def refusals(rank: Rank) -> list[str]:
    """Wrong calls on rank 0 alone: had one been launched, the ranks would be out of step."""
    group = shared(rank)
    rows = torch.ones(4, 2, device=DEVICE)
    messages = []
    wrong: list[Callable[[], object]] = [
        lambda: group.all_gather(rows.cpu()),
        lambda: group.all_gatherv(rows, [4] * (rank.world_size + 1)),
        lambda: group.all_gatherv(rows, [5] * rank.world_size),
        lambda: group.reduce_scatterv(rows, [3] * rank.world_size),
        lambda: group.all_reduce(rows.bool()),
        lambda: group.all_gather(rows[:, :1]),
        lambda: group.broadcast(rows, src=-1),
    ]
    for call in wrong if rank.rank == 0 else []:
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    assert_bits(group, group.all_reduce(rows), torch.full((4, 2), float(rank.world_size)), "all_reduce")
    return messages


def leave_one_out(rank: Rank, name: str, action: str) -> list[str]:
    """The last rank joins and never comes. Returns the others' messages, the first and that of the next call."""
    group = join(rank.rank, rank.world_size, rank.run_dir, name)
    step = Step(group, [r + 1 for r in range(rank.world_size)])
    launch: Callable[[], object]
    if action == "replay":
        launch = capture(step.run, group)[0].replay
    else:
        launch = partial(group.all_gatherv, step.inputs[0], step.sizes)
    launch()
    group.synchronize()
    if rank.rank == rank.world_size - 1:
        rank.state[name] = group, launch  # alive, so that the others see silence and not a death
        return []
    launch()
    messages = [failure_of(lambda: group.synchronize(timeout_s=1))]
    messages.append(failure_of(lambda: group.all_reduce(step.inputs[2])))
    assert torch.ones(8, device=DEVICE).sum().item() == 8, "the GPU is not usable any more"
    return messages


def used_memory_after_rejoining(rank: Rank, times: int) -> list[int]:
    """MiB in use on the GPU each time that all ranks have joined a group, used it and left."""
    used = []
    with SharedMemoryCommunicator(rank.rank, rank.world_size, rank.run_dir, "rejoining", 30) as cpu_group:
        for attempt in range(times):
            with join(rank.rank, rank.world_size, rank.run_dir, f"rejoining-{attempt}") as group:
                group.all_gather(torch.ones(1000, device=DEVICE))
                group.synchronize()
            cpu_group.barrier()
            free, total = torch.cuda.mem_get_info(DEVICE)
            used.append((total - free) >> 20)
            cpu_group.barrier()
    return used
