"""What one rank does in the tests of the communicators. Runs in the processes of `rank_processes`."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nibble.distributed import shared_memory
from nibble.distributed.communicator import (
    SUMMABLE_DTYPES,
    CollectiveError,
    Communicator,
    SingleRankCommunicator,
)
from nibble.distributed.gloo import GlooCommunicator, open_store
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.prefill_delayer import RankReport
from rank_processes import Rank

GATHER_DTYPES = (
    torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def create(
    rank: Rank, backend: str, world_size: int, name: str, timeout_s: float = 30, buffer_bytes: int = 64 << 10
) -> Communicator:
    if backend == "single":
        return SingleRankCommunicator(name)
    if backend == "gloo":
        return GlooCommunicator(rank.rank, world_size, f"file://{rank.run_dir}/{name}", name, timeout_s)
    return SharedMemoryCommunicator(rank.rank, world_size, rank.run_dir, name, timeout_s, buffer_bytes)


def shared(rank: Rank, backend: str, world_size: int) -> Communicator:
    """The group of the first `world_size` ranks that all checks of a backend use, one after the other."""
    name = f"{backend}-{world_size}"
    if name not in rank.state:
        rank.state[name] = create(rank, backend, world_size, name)
    communicator: Communicator = rank.state[name]
    return communicator


def random_rows(seed: int, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Random bytes, so every bit pattern: NaNs, infinities, subnormals. The same for everyone who asks."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    high = 2 if dtype == torch.bool else 256
    octets = torch.randint(0, high, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return octets.view(dtype).squeeze(-1)


def small_integers(seed: int, rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Values whose sums are exact in every dtype, in any order."""
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return torch.randint(0, 30, tuple(shape), generator=generator).to(dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str) -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    same = torch.equal(actual.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    assert same, f"{what}: got {actual}, expected {expected}"


def assert_own_memory(result: Tensor, *inputs: Tensor) -> None:
    addresses = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
    assert result.numel() == 0 or result.untyped_storage().data_ptr() not in addresses, "the result aliases an input"


def check_gathers(rank: Rank, backend: str, world_size: int, sizes: list[int]) -> None:
    group = shared(rank, backend, world_size)
    for seed, dtype in enumerate(GATHER_DTYPES):
        inputs = [random_rows(seed, r, (size, 3, 5), dtype) for r, size in enumerate(sizes)]
        own = inputs[rank.rank].clone()
        gathered = group.all_gatherv(own, sizes)
        assert_same_bits(gathered, torch.cat(inputs), f"all_gatherv {dtype}")
        assert_same_bits(own, inputs[rank.rank], f"the input of all_gatherv {dtype}")
        if backend != "single":
            assert_own_memory(gathered, own)
        if len(set(sizes)) == 1:
            assert_same_bits(group.all_gather(own), torch.cat(inputs), f"all_gather {dtype}")


def check_prepared_gather(rank: Rank, backend: str, world_size: int) -> None:
    """The same memory again and again, with what it holds at each call."""
    communicator = shared(rank, backend, world_size)
    x = torch.zeros(2, 3, dtype=torch.int64)
    output = torch.zeros(2 * world_size, 3, dtype=torch.int64)
    gather = communicator.prepare_all_gather(x, output)
    for call in range(20):
        x.fill_(100 * rank.rank + call)
        gather()
        expected = [100 * peer + call for peer in range(world_size) for _ in range(2)]
        assert output.tolist() == [[value] * 3 for value in expected]


def check_list_gather(rank: Rank, backend: str, world_size: int, sizes: list[int]) -> None:
    group = shared(rank, backend, world_size)
    kinds = [((7,), torch.uint8), ((), torch.float32), ((2, 3), torch.bfloat16), ((0,), torch.int32)]
    kinds += [((5,), torch.float8_e4m3fn), ((1,), torch.int64)]
    inputs = [
        [random_rows(seed, r, (size, *trailing), dtype) for r, size in enumerate(sizes)]
        for seed, (trailing, dtype) in enumerate(kinds)
    ]
    own = [ranks[rank.rank].clone() for ranks in inputs]
    gathered = group.all_gatherv(own, sizes)
    assert isinstance(gathered, list)
    for result, ranks, kind in zip(gathered, inputs, kinds, strict=True):
        assert_same_bits(result, torch.cat(ranks), f"all_gatherv of a list, {kind}")
        assert result.is_contiguous()
        if backend != "single":
            assert_own_memory(result, *own, *[other for other in gathered if other is not result])


def check_reductions(rank: Rank, backend: str, world_size: int, sizes: list[int]) -> None:
    group = shared(rank, backend, world_size)
    for seed, dtype in enumerate(SUMMABLE_DTYPES):
        inputs = [small_integers(seed, r, (sum(sizes), 3), dtype) for r in range(world_size)]
        expected = torch.stack(inputs).double().sum(0).to(dtype)
        own = inputs[rank.rank].clone()
        results = [(group.reduce_scatterv(own, sizes), expected.split(sizes)[rank.rank], "reduce_scatterv")]
        results.append((group.all_reduce(own), expected, "all_reduce"))
        if len(set(sizes)) == 1:
            results.append((group.reduce_scatter(own), expected.split(sizes)[rank.rank], "reduce_scatter"))
        for result, oracle, collective in results:
            assert_same_bits(result, oracle, f"{collective} {dtype}")
            if backend != "single":
                assert_own_memory(result, own)
        assert_same_bits(own, inputs[rank.rank], f"the input of the reductions of {dtype}")


def rows_for(owner: int, inputs: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """What an all-to-all of `inputs`, by rank, brings to the rank `owner`."""
    return torch.cat([x.split(sizes)[owner] for x in inputs])


def check_all_to_alls(rank: Rank, backend: str, world_size: int, distributions: list[list[int]]) -> None:
    group = shared(rank, backend, world_size)
    for sizes in distributions:
        for seed, dtype in enumerate(GATHER_DTYPES):
            inputs = [random_rows(seed, r, (sum(sizes), 3, 5), dtype) for r in range(world_size)]
            own = inputs[rank.rank].clone()
            result = group.all_to_allv(own, sizes)
            assert_same_bits(result, rows_for(rank.rank, inputs, sizes), f"all_to_allv {dtype} {sizes}")
            assert_same_bits(own, inputs[rank.rank], f"the input of all_to_allv {dtype} {sizes}")
            if backend != "single":
                assert_own_memory(result, own)


def check_broadcasts(rank: Rank, backend: str, world_size: int) -> None:
    group = shared(rank, backend, world_size)
    for src in range(world_size):
        for seed, dtype in enumerate(GATHER_DTYPES):
            for shape in ((), (0, 3), (4, 5)):
                inputs = [random_rows(seed, r, shape, dtype) for r in range(world_size)]
                own = inputs[rank.rank].clone()
                group.broadcast(own, src)
                assert_same_bits(own, inputs[src], f"broadcast {dtype} {shape} from {src}")


def check_order_of_sums(rank: Rank, backend: str, world_size: int, elements: int) -> None:
    """fp16 and bf16 are summed in fp32, in rank order, and rounded once."""
    group = shared(rank, backend, world_size)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        inputs = []
        for r in range(world_size):
            generator = torch.Generator().manual_seed(seed * 100 + r)
            exponents = torch.randint(-14, 14, (elements,), generator=generator)
            inputs.append((torch.randn(elements, generator=generator) * 2.0**exponents).to(dtype))
        inputs[-1] = -inputs[0]  # what is left depends on the bits that were lost on the way, so on the order
        total = inputs[0].float()
        for term in inputs[1:]:
            total = total + term.float()
        expected = total.to(dtype)
        assert_same_bits(group.all_reduce(inputs[rank.rank]), expected, f"all_reduce {dtype}")
        sizes = [elements] + [0] * (world_size - 1)
        for owner in range(world_size):
            shifted = sizes[-owner:] + sizes[:-owner]
            result = group.reduce_scatterv(inputs[rank.rank], shifted)
            assert_same_bits(result, expected.split(shifted)[rank.rank], f"reduce_scatterv {dtype} to {owner}")


def check_large_payloads(rank: Rank, backend: str, world_size: int) -> None:
    """Many times the buffer, in rows that are larger than the buffer, too."""
    group = shared(rank, backend, world_size)
    for width in (96, 70_001):
        sizes = [200_000 * (r % 2 + 1) // width for r in range(world_size)]
        check_payload(group, sizes, width)
    large = [small_integers(7, r, (300_001,), torch.int32) for r in range(world_size)]
    assert_same_bits(group.all_reduce(large[rank.rank]), torch.stack(large).sum(0, dtype=torch.int32), "all_reduce")
    group.broadcast(large[rank.rank], src=world_size - 1)
    assert_same_bits(large[rank.rank], large[-1], "broadcast")


def check_payload(group: Communicator, sizes: list[int], width: int) -> None:
    rows = [random_rows(1, r, (size, width), torch.uint8) for r, size in enumerate(sizes)]
    marks = [random_rows(2, r, (size,), torch.int64) for r, size in enumerate(sizes)]
    gathered = group.all_gatherv([rows[group.rank], marks[group.rank]], sizes)
    assert_same_bits(gathered[0], torch.cat(rows), "all_gatherv")
    assert_same_bits(gathered[1], torch.cat(marks), "all_gatherv")
    terms = [small_integers(3, r, (sum(sizes), width), torch.float32) for r in range(group.world_size)]
    result = group.reduce_scatterv(terms[group.rank], sizes)
    assert_same_bits(result, torch.stack(terms).sum(0).split(sizes)[group.rank], "reduce_scatterv")
    assert_same_bits(group.all_to_allv(terms[group.rank], sizes), rows_for(group.rank, terms, sizes), "all_to_allv")


def run_program(rank: Rank, backend: str, world_size: int, program: list[dict[str, Any]]) -> None:
    """A sequence of collectives, with pauses before them and, for shared memory, within their reads and writes."""
    name = f"program-{backend}"
    if name not in rank.state:
        rank.state[name] = create(rank, backend, world_size, name, buffer_bytes=512)
    group: Communicator = rank.state[name]
    with dawdling(random.Random(rank.rank)) if backend == "shared_memory" else nullcontext():
        for step, operation in enumerate(program):
            time.sleep(operation["pauses_ms"][rank.rank] / 1000)
            apply(group, step, operation["collective"], operation["sizes"])


def apply(group: Communicator, seed: int, collective: str, sizes: list[int]) -> None:
    rank, ranks = group.rank, range(group.world_size)
    if collective == "all_gatherv":
        inputs = [random_rows(seed, r, (sizes[r], 24), torch.uint8) for r in ranks]
        assert_same_bits(group.all_gatherv(inputs[rank], sizes), torch.cat(inputs), collective)
    elif collective == "reduce_scatterv":
        inputs = [small_integers(seed, r, (sum(sizes), 6), torch.float32) for r in ranks]
        expected = torch.stack(inputs).sum(0).split(sizes)[rank]
        assert_same_bits(group.reduce_scatterv(inputs[rank], sizes), expected, collective)
    elif collective == "all_to_allv":
        inputs = [random_rows(seed, r, (sum(sizes), 7), torch.uint8) for r in ranks]
        assert_same_bits(group.all_to_allv(inputs[rank], sizes), rows_for(rank, inputs, sizes), collective)
    elif collective == "all_gather":
        inputs = [random_rows(seed, r, (sizes[0], 3), torch.int64) for r in ranks]
        assert_same_bits(group.all_gather(inputs[rank]), torch.cat(inputs), collective)
    elif collective == "all_reduce":
        inputs = [small_integers(seed, r, (sizes[0], 5), torch.int32) for r in ranks]
        expected = torch.stack(inputs).sum(0, dtype=torch.int32)
        assert_same_bits(group.all_reduce(inputs[rank]), expected, collective)
    elif collective == "broadcast":
        inputs = [random_rows(seed, r, (sizes[0], 9), torch.uint8) for r in ranks]
        src = sizes[1] % group.world_size
        expected = inputs[src].clone()
        group.broadcast(inputs[rank], src)
        assert_same_bits(inputs[rank], expected, collective)
    else:
        group.barrier()


@contextmanager
def dawdling(chance: random.Random) -> Iterator[None]:
    """Makes one copy or sum in four slow to start, so that ranks are inside different phases of a round."""

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def start_late(*arguments: Any) -> Any:
            if chance.random() < 0.25:
                time.sleep(chance.random() * 0.002)
            return function(*arguments)

        return start_late

    with ExitStack() as patches:
        for owner, name in (
            (shared_memory.SharedMemoryCommunicator, "_next_half"),
            (shared_memory.SharedMemoryCommunicator, "_header_of"),
            (shared_memory.ctypes, "memmove"),
            (shared_memory, "sum_in_rank_order"),
        ):
            patches.enter_context(mock.patch.object(owner, name, slow(getattr(owner, name))))
        yield


def use_two_groups(rank: Rank, backend: str, port: int) -> None:
    """Four ranks in a grid: rows and columns talk in turn, and not all in the same order."""
    row, column = divmod(rank.rank, 2)
    if backend == "gloo":
        store = open_store(f"tcp://127.0.0.1:{port}", rank.rank, rank.world_size, timeout_s=30)
        by_row: Communicator = GlooCommunicator(column, 2, store, f"row-{row}", timeout_s=30)
        by_column: Communicator = GlooCommunicator(row, 2, store, f"column-{column}", timeout_s=30)
    else:
        by_row = SharedMemoryCommunicator(column, 2, rank.run_dir, f"row-{row}", timeout_s=30)
        by_column = SharedMemoryCommunicator(row, 2, rank.run_dir, f"column-{column}", timeout_s=30)
    own = torch.tensor([rank.rank])
    for _ in range(10):
        assert by_row.all_gather(own).tolist() == [2 * row, 2 * row + 1]
        assert by_row.all_reduce(own).tolist() == [4 * row + 1]
        assert by_column.all_gather(own).tolist() == [column, column + 2]
    by_column.barrier()
    by_row.barrier()  # all four have come here through one of the two: rank 0 may take its store away
    by_column.barrier()
    by_row.close()
    by_column.close()


def failure_of(action: Callable[[], object]) -> str:
    """The message of the CollectiveError that the action must raise."""
    try:
        action()
    except CollectiveError as error:
        return str(error)
    raise AssertionError("nothing failed")


def call_until_a_peer_dies(rank: Rank, world_size: int) -> dict[str, str]:
    """Returns every backend's message."""
    limits_s = {"shared_memory": 20.0, "gloo": 3.0}  # with gloo a survivor may see the other's death by silence only
    groups = {name: create(rank, name, world_size, name, limit) for name, limit in limits_s.items()}
    sizes = [100] * (world_size - 1) + [0]
    own = torch.ones(sizes[rank.rank], 100)
    messages: dict[str, str] = {}
    while len(messages) < len(groups):
        for name, group in groups.items():
            try:
                group.all_gatherv(own, sizes)
            except CollectiveError as error:
                messages.setdefault(name, str(error))
        (rank.run_dir / f"rank-{rank.rank}-is-running").touch()
    return messages


def stay_away(rank: Rank, backend: str, world_size: int, name: str) -> list[str]:
    """The last rank joins and never comes. Returns the messages of two calls, the others' first and second."""
    shared(rank, backend, world_size).barrier()  # so that all join in time
    group = create(rank, backend, world_size, name, timeout_s=0.5)
    if rank.rank == world_size - 1:
        rank.state[name] = group  # alive, so that the others see silence and not a death
        return []
    sync = DpSync(group)
    report = RankReport(1, 1, True, 0, 0, True, sequence=1, step_us=0)
    messages = [failure_of(lambda: sync.exchange(report)), failure_of(group.barrier)]
    group.close()
    return messages


def come_late(rank: Rank, name: str) -> str:
    """Rank 0 comes at once and waits for 0.5 s, rank 1 only then."""
    shared(rank, "shared_memory", 2).barrier()  # so that both join in time
    group = create(rank, "shared_memory", 2, name, timeout_s=[0.5, 20][rank.rank])
    gone = rank.run_dir / f"{name}.gone"
    while rank.rank == 1 and not gone.exists():
        time.sleep(0.01)
    message = failure_of(group.barrier)
    gone.touch()
    return message


def join_without_the_last(rank: Rank, backend: str, world_size: int, name: str) -> str:
    return failure_of(lambda: create(rank, backend, world_size, name, timeout_s=0.5))


def join_with(rank: Rank, name: str, buffer_bytes: list[int]) -> str:
    join = lambda: create(rank, "shared_memory", 2, name, buffer_bytes=buffer_bytes[rank.rank])  # noqa: E731
    return failure_of(join)


def enter_different_collectives(rank: Rank, name: str) -> str:
    group = create(rank, "shared_memory", 2, name)
    x = torch.ones(4)
    return failure_of(group.barrier if rank.rank else lambda: group.all_gather(x))


def disagree_on_sizes(rank: Rank, name: str) -> str:
    """Rank 1's sizes come from another group: its own entry and the sum fit, those of the others do not."""
    group = create(rank, "shared_memory", 3, name)
    sizes = [[2, 1, 3], [3, 1, 2], [2, 1, 3]][rank.rank]
    return failure_of(lambda: group.reduce_scatterv(torch.ones(6, 2), sizes))


def join_in_directory(rank: Rank, run_dir: str) -> list[str]:
    """Returns the files that are left while the group lives."""
    with SharedMemoryCommunicator(rank.rank, 2, Path(run_dir), "files", timeout_s=30) as group:
        group.all_gather(torch.ones(3))
        group.barrier()
        left = sorted(path.name for path in Path(run_dir).iterdir())
        group.barrier()
    group.close()
    return left


def shared_memory_files(rank: Rank) -> list[str]:
    """The files under /dev/shm that this process maps."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]
