"""The CUDA backend without a GPU: what it asks of NCCL, checked call by call, and what becomes of NCCL's errors.

All ranks live in this process, on a stand-in of libnccl that moves the bytes as NCCL would. With the real library and
on GPUs: test/gpu/test_pynccl.py.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nccl_stand_in import LAST_ERROR, CudaStandIn, NcclStandIn
from nibble.distributed import pynccl, pynccl_wrapper
from nibble.distributed.communicator import SUMMABLE_DTYPES, CollectiveError, Communicator, PeerError
from nibble.distributed.pynccl import DATA_TYPES, PyNcclCommunicator
from nibble.distributed.pynccl_wrapper import NcclLibrary

CPU = torch.device("cpu")
SIZES = [[4, 4, 4], [3, 1, 6], [0, 3, 1], [2, 0, 1], [2, 1, 0], [0, 0, 5], [0, 0, 0], [2, 2], [5, 0], [7], [0]]


class SameProcess(Communicator):
    """The bootstrap group of ranks that join one after the other in this process."""

    def __init__(self, rank: int, world_size: int, post: dict[str, Tensor]) -> None:
        super().__init__(rank, world_size, "bootstrap")
        self.post = post

    def close(self) -> None:
        super().close()

    def _broadcast(self, x: Tensor, src: int) -> None:
        if self.rank == src:
            self.post["x"] = x.clone()
        x.copy_(self.post["x"])

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        raise NotImplementedError

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def _barrier(self) -> None:
        raise NotImplementedError


@dataclass
class Ranks:
    """The ranks of one group, all in this process."""

    world_size: int
    nccl: NcclStandIn = field(default_factory=NcclStandIn)
    cuda: CudaStandIn = field(default_factory=CudaStandIn)
    timeout_s: float = 0.02
    post: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = [self.join(rank) for rank in range(self.world_size)]

    def join(self, rank: int) -> PyNcclCommunicator:
        bootstrap = SameProcess(rank, self.world_size, self.post)
        library = NcclLibrary(self.nccl, "libnccl-stand-in.so")
        return PyNcclCommunicator(bootstrap, "moe_ep", self.timeout_s, CPU, library, self.cuda)

    def run(self, call: Callable[[PyNcclCommunicator, int], object]) -> list:
        """Every rank's results of `call(group, rank)`, after the stand-in has run what they launched."""
        results = [call(group, rank) for rank, group in enumerate(self.groups)]
        self.nccl.deliver()
        return results


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers: their sums are exact in every dtype."""
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


def equal_bits(x: Tensor, y: Tensor) -> bool:
    as_bytes = [tensor.reshape(-1).view(torch.uint8) for tensor in (x, y)]
    return (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(*as_bytes)


# --- What the collectives return


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    kinds=st.lists(
        st.tuples(
            st.sampled_from([(), (5,), (2, 3), (0,)]),
            st.sampled_from([*DATA_TYPES, torch.float8_e4m3fn, torch.bool]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_gathers_return_every_ranks_rows_in_rank_order(
    sizes: list[int], kinds: list[tuple[tuple[int, ...], torch.dtype]]
) -> None:
    ranks = Ranks(len(sizes))
    inputs = [[values(rank, (size, *width), dtype) for width, dtype in kinds] for rank, size in enumerate(sizes)]
    gathered = ranks.run(lambda group, rank: group.all_gatherv(inputs[rank], sizes))
    single = ranks.run(lambda group, rank: group.all_gatherv(inputs[rank][0], sizes))
    for result, alone in zip(gathered, single, strict=True):
        assert all(equal_bits(x, torch.cat(parts)) for x, parts in zip(result, zip(*inputs, strict=True), strict=True))
        assert equal_bits(alone, torch.cat([tensors[0] for tensors in inputs]))
    if len(set(sizes)) == 1:
        plain = ranks.run(lambda group, rank: group.all_gather(inputs[rank][0]))
        assert all(map(equal_bits, plain, single))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    width=st.sampled_from([(), (5,), (2, 3), (0,)]),
    dtype=st.sampled_from(SUMMABLE_DTYPES),
)
def test_reductions_return_the_sum(sizes: list[int], width: tuple[int, ...], dtype: torch.dtype) -> None:
    ranks = Ranks(len(sizes))
    inputs = [values(rank, (sum(sizes), *width), dtype) for rank in range(len(sizes))]
    total = torch.stack(inputs).to(torch.int64).sum(0).to(dtype)
    scattered = ranks.run(lambda group, rank: group.reduce_scatterv(inputs[rank], sizes))
    assert all(map(equal_bits, scattered, total.split(sizes)))
    reduced = ranks.run(lambda group, rank: group.all_reduce(inputs[rank]))
    assert all(equal_bits(result, total) for result in reduced)
    if len(set(sizes)) == 1:
        plain = ranks.run(lambda group, rank: group.reduce_scatter(inputs[rank]))
        assert all(map(equal_bits, plain, scattered))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    width=st.sampled_from([(), (5,), (2, 3), (0,)]),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float8_e4m3fn]),
)
def test_an_all_to_all_returns_every_ranks_rows_for_this_one_in_rank_order(
    sizes: list[int], width: tuple[int, ...], dtype: torch.dtype
) -> None:
    ranks = Ranks(len(sizes))
    inputs = [values(rank, (sum(sizes), *width), dtype) for rank in range(len(sizes))]
    results = ranks.run(lambda group, rank: group.all_to_allv(inputs[rank], sizes))
    expected = [torch.cat([x.split(sizes)[owner] for x in inputs]) for owner in range(len(sizes))]
    assert all(map(equal_bits, results, expected))
    assert len({call.group for call in ranks.nccl.calls}) <= len(sizes), "one group a rank"
    assert all(call.group for call in ranks.nccl.calls)


@pytest.mark.parametrize("dtype", [*DATA_TYPES, torch.float8_e4m3fn])
def test_broadcast_and_send_overwrite_the_receiver(dtype: torch.dtype) -> None:
    ranks = Ranks(3)
    inputs = [values(rank, (4, 3), dtype) for rank in range(3)]
    tensors = [x.clone() for x in inputs]
    ranks.run(lambda group, rank: group.broadcast(tensors[rank], src=1))
    assert all(equal_bits(x, inputs[1]) for x in tensors)
    tensors = [x.clone() for x in inputs]
    ranks.groups[2].send(tensors[2], dst=0)
    ranks.groups[0].recv(tensors[0], src=2)
    ranks.nccl.deliver()
    assert all(equal_bits(x, inputs[y]) for x, y in zip(tensors, (2, 1, 2), strict=True))


def test_everything_that_can_be_summed_has_a_data_type_of_nccl() -> None:
    assert set(DATA_TYPES) == set(SUMMABLE_DTYPES)


# --- What NCCL is asked for


@pytest.mark.parametrize("sizes", SIZES)
def test_a_gather_is_one_flat_group_of_one_call_a_tensor_or_one_a_root_with_rows(sizes: list[int]) -> None:
    ranks = Ranks(len(sizes))
    widths = (16, 3)
    inputs = [[torch.ones(size, width, dtype=torch.int16) for width in widths] for size in sizes]
    results = ranks.run(lambda group, rank: group.all_gatherv(inputs[rank], sizes))
    roots = [root for root, size in enumerate(sizes) if size]
    even = len(set(sizes)) == 1
    for rank in range(len(sizes)):
        calls = ranks.nccl.of_rank(rank)
        assert len({call.group for call in calls}) == (1 if roots else 0)
        assert all(call.group and call.dtype == pynccl_wrapper.DataType.UINT8 for call in calls)
        if even:
            assert [(call.name, call.count) for call in calls if roots] == [
                ("all_gather", sizes[0] * width * 2) for width in widths if sizes[0]
            ]
            assert [call.send for call in calls] == [x.data_ptr() for x in inputs[rank] if roots]
        else:
            assert [(call.name, call.peer, call.count) for call in calls] == [
                ("broadcast", root, sizes[root] * width * 2) for width in widths for root in roots
            ]
            assert [call.recv for call in calls] == [
                result[sum(sizes[:root]) :].data_ptr() for result in results[rank] for root in roots
            ]
            sent = [call.send for call in calls if call.peer == rank]
            assert sent == [x.data_ptr() for x in inputs[rank] if x.numel()]
    assert ranks.nccl.groups == (len(sizes) if roots else 0)
    assert ranks.nccl.group_depth == 0


@pytest.mark.parametrize("sizes", SIZES)
def test_a_reduce_scatter_is_one_call_or_one_flat_group_of_one_reduce_a_root_with_rows(sizes: list[int]) -> None:
    ranks = Ranks(len(sizes))
    x = torch.ones(sum(sizes), 2, 3, dtype=torch.bfloat16)
    results = ranks.run(lambda group, rank: group.reduce_scatterv(x, sizes))
    roots = [root for root, size in enumerate(sizes) if size]
    for rank, result in enumerate(results):
        calls = ranks.nccl.of_rank(rank)
        if len(set(sizes)) == 1:
            assert [(c.name, c.send, c.recv, c.count, c.dtype) for c in calls] == [
                ("reduce_scatter", x.data_ptr(), result.data_ptr(), sizes[0] * 6, 9) for _ in roots[:1]
            ]
            assert not any(call.group for call in calls)
        else:
            assert [(c.name, c.peer, c.send, c.recv, c.count, c.dtype) for c in calls] == [
                (
                    "reduce",
                    root,
                    x[sum(sizes[:root]) :].data_ptr(),
                    result.data_ptr() if root == rank else 0,
                    sizes[root] * 6,
                    9,
                )
                for root in roots
            ]
            assert len({call.group for call in calls}) == 1 and calls[0].group


def test_nccl_groups_are_never_nested() -> None:
    """Some versions of NCCL hang on a group within a group."""
    ranks = Ranks(3)
    rows = torch.ones(6, 4)
    for sizes in ([2, 2, 2], [1, 3, 2], [0, 6, 0]):
        ranks.run(lambda group, rank, sizes=sizes: group.all_gatherv([rows[: sizes[rank]]] * 2, sizes))
        ranks.run(lambda group, rank, sizes=sizes: group.reduce_scatterv(rows, sizes))
    for call in (lambda group, _: group.all_reduce(rows), lambda group, _: group.broadcast(rows, src=1)):
        ranks.run(call)
    assert ranks.nccl.deepest_group == 1


def test_an_idle_rank_launches_what_its_peers_launch() -> None:
    ranks = Ranks(3)
    sizes = [0, 2, 1]
    ranks.run(lambda group, rank: group.all_gatherv(torch.ones(sizes[rank], 4), sizes))
    ranks.run(lambda group, rank: group.reduce_scatterv(torch.ones(3, 4), sizes))
    names = [[call.name for call in ranks.nccl.of_rank(rank)] for rank in range(3)]
    assert names == [["broadcast", "broadcast", "reduce", "reduce"]] * 3


def test_every_call_goes_to_the_stream_that_is_current_then() -> None:
    ranks = Ranks(2)
    for stream in (0x1_0000_0001, 0):
        ranks.cuda.cuda_stream = stream
        ranks.run(lambda group, rank: group.all_reduce(torch.ones(3)))
        ranks.run(lambda group, rank: group.all_gatherv(torch.ones(rank, 3), [0, 1]))
    assert [call.stream or 0 for call in ranks.nccl.of_rank(0)] == [0x1_0000_0001] * 2 + [0] * 2


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda group: group.all_gather(torch.ones(2, device="meta")), "all_gather.*expected a tensor on cpu"),
        (lambda group: group.all_gatherv(torch.ones(2, 4)[:, :2], [2, 2]), "all_gatherv.*contiguous"),
        (lambda group: group.reduce_scatterv(torch.ones(3), [2, 2]), "reduce_scatterv.*3 rows, expected 4"),
        (lambda group: group.send(torch.ones(3), dst=0), "send.*dst must be another rank between 0 and 1, got 0"),
        (lambda group: group.recv(torch.ones(3), src=2), "recv.*src must be another rank between 0 and 1, got 2"),
        (lambda group: group.send(torch.ones(3, device="meta"), dst=1), "send.*expected a tensor on cpu"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_launched(
    call: Callable[[PyNcclCommunicator], object], reason: str
) -> None:
    ranks = Ranks(2)
    with pytest.raises(ValueError, match=reason):
        call(ranks.groups[0])
    assert ranks.nccl.calls == []
    ranks.run(lambda group, rank: group.all_reduce(torch.ones(1)))


def test_empty_tensors_are_not_sent() -> None:
    ranks = Ranks(2)
    ranks.groups[0].send(torch.ones(0), dst=1)
    ranks.groups[1].recv(torch.ones(0), src=0)
    ranks.run(lambda group, rank: group.reduce_scatterv(torch.ones(3, 0), [1, 2]))
    assert ranks.nccl.calls == []


# --- When something fails


LAUNCHES = {
    "ncclAllReduce": ("all_reduce", lambda group: group.all_reduce(torch.ones(2))),
    "ncclAllGather": ("all_gather", lambda group: group.all_gather(torch.ones(2))),
    "ncclReduceScatter": ("reduce_scatter", lambda group: group.reduce_scatter(torch.ones(2))),
    "ncclBroadcast": ("all_gatherv", lambda group: group.all_gatherv(torch.ones(2), [2, 1])),
    "ncclReduce": ("reduce_scatterv", lambda group: group.reduce_scatterv(torch.ones(3), [2, 1])),
    "ncclGroupStart": ("all_gatherv", lambda group: group.all_gatherv(torch.ones(2), [2, 1])),
    "ncclGroupEnd": ("reduce_scatterv", lambda group: group.reduce_scatterv(torch.ones(3), [2, 1])),
    "ncclSend": ("send", lambda group: group.send(torch.ones(2), dst=1)),
    "ncclRecv": ("recv", lambda group: group.recv(torch.ones(2), src=1)),
    "ncclCommGetAsyncError": ("check", lambda group: group.check()),
}


@pytest.mark.parametrize("function", LAUNCHES)
def test_an_error_of_nccl_names_collective_function_and_reason_and_closes_the_group(function: str) -> None:
    ranks = Ranks(2)
    collective, call = LAUNCHES[function]
    ranks.nccl.fails[function] = 1
    with pytest.raises(CollectiveError) as caught:
        call(ranks.groups[0])
    expected = f"{function} failed: unhandled cuda error (ncclResult_t 1); {LAST_ERROR.decode()}"
    assert str(caught.value) == f"{collective} in group 'moe_ep', rank 0: {expected}"
    ranks.nccl.fails.clear()
    with pytest.raises(CollectiveError, match=f"all_reduce in group 'moe_ep', rank 0: {collective} .*{function}"):
        ranks.groups[0].all_reduce(torch.ones(2))
    ranks.groups[0].close()
    assert ranks.nccl.ended == [("abort", 0)]


@pytest.mark.parametrize("function", ["ncclBroadcast", "ncclReduce"])
def test_a_group_that_fails_half_way_is_ended_so_that_later_launches_do_not_wait_for_it(function: str) -> None:
    ranks = Ranks(2)
    ranks.nccl.fails[function] = 5
    with pytest.raises(CollectiveError):
        LAUNCHES[function][1](ranks.groups[0])
    assert (ranks.nccl.groups, ranks.nccl.group_depth) == (1, 0)


@pytest.mark.parametrize("call", ["check", "synchronize"])
def test_a_failure_that_nccl_notices_later_is_raised_by_the_next_check(call: str) -> None:
    ranks = Ranks(2)
    ranks.run(lambda group, rank: group.all_gather(torch.ones(2)))
    getattr(ranks.groups[1], call)()
    ranks.run(lambda group, rank: group.all_gather(torch.ones(2)))
    ranks.nccl.async_error = 6
    with pytest.raises(CollectiveError, match=r"^all_gather in group 'moe_ep', rank 1: NCCL failed: remote process"):
        getattr(ranks.groups[1], call)()
    assert ranks.nccl.ended == [("abort", 1)]


@pytest.mark.parametrize("call", ["check", "synchronize"])
def test_what_is_watched_beside_nccl_ends_the_group_before_the_deadline_with_its_own_words(call: str) -> None:
    """NCCL's deadline can't say who is missing; whoever waited in peer memory can."""
    ranks = Ranks(2)
    missing: list[int] = []

    def raise_failure() -> None:
        if missing:
            raise PeerError(f"rank {missing[0]} did not arrive")

    ranks.groups[0].watch(raise_failure)
    getattr(ranks.groups[0], call)()
    missing.append(1)
    ranks.cuda.hangs = True
    with pytest.raises(CollectiveError, match=f"^{call} in group 'moe_ep', rank 0: rank 1 did not arrive$"):
        getattr(ranks.groups[0], call)()
    assert ranks.nccl.ended == [("abort", 0)]


def test_a_group_that_is_taken_along_ends_with_the_one_that_is_waited_for_and_is_watched_there() -> None:
    """A kernel of either that goes on waiting would keep the GPU."""
    ranks, others = Ranks(2), Ranks(2)
    ranks.groups[0].take_along(others.groups[0])
    ranks.groups[0].synchronize()
    ranks.cuda.hangs = True
    with pytest.raises(CollectiveError, match="the GPU did not finish"):
        ranks.groups[0].synchronize()
    assert ranks.nccl.ended == others.nccl.ended == [("abort", 0)]
    with pytest.raises(CollectiveError, match="the GPU did not finish"):
        others.groups[0].all_gather(torch.zeros(1))
    ranks, others = Ranks(2), Ranks(2)
    ranks.groups[0].take_along(others.groups[0])
    others.nccl.async_error = 6
    for _ in range(2):
        with pytest.raises(CollectiveError, match="ncclResult_t 6"):
            ranks.groups[0].synchronize()
    assert ranks.nccl.ended == others.nccl.ended == [("abort", 0)]


def test_work_in_progress_is_no_failure() -> None:
    ranks = Ranks(1)
    ranks.nccl.async_error = pynccl_wrapper.IN_PROGRESS
    ranks.groups[0].check()


@pytest.mark.parametrize(
    ("launches", "waits", "message"),
    [
        (1, lambda group: group.synchronize(), "all_gather in .*did not finish it within 0.02 s"),
        (
            3,
            lambda group: group.synchronize(timeout_s=0.01),
            "all_gather in .*all of the last 3 collectives within 0.01 s",
        ),
        (0, lambda group: group.synchronize(), "synchronize in .*a CUDA graph or other work within 0.02 s"),
        (0, lambda group: group.barrier(), "barrier in .*did not finish it within 0.02 s"),
    ],
)
def test_a_peer_that_does_not_come_ends_the_wait_in_an_error_that_names_the_collective(
    launches: int, waits: Callable[[PyNcclCommunicator], None], message: str
) -> None:
    ranks = Ranks(2)
    group = ranks.groups[0]
    ranks.run(lambda group, rank: group.all_reduce(torch.ones(2)))
    group.synchronize()
    for _ in range(launches):
        group.all_gather(torch.ones(2))
    ranks.cuda.hangs = True
    with pytest.raises(CollectiveError, match=f"^{message}; a peer died, did not arrive or entered another"):
        waits(group)
    assert ranks.nccl.ended == [("abort", 0)]
    ranks.cuda.hangs = False
    with pytest.raises(CollectiveError, match=r"synchronize in group 'moe_ep', rank 0: .*a peer died"):
        group.synchronize()


@pytest.mark.parametrize("call", ["synchronize", "barrier"])
def test_waiting_is_refused_while_a_graph_is_captured_and_the_group_lives_on(call: str) -> None:
    ranks = Ranks(1)
    ranks.cuda.capturing = True
    with pytest.raises(ValueError, match=f"{call} in group 'moe_ep', rank 0: a CUDA graph is being captured"):
        getattr(ranks.groups[0], call)()
    ranks.cuda.capturing = False
    getattr(ranks.groups[0], call)()


# --- Joining and leaving


def test_every_rank_joins_on_its_device_and_leaves_once() -> None:
    ranks = Ranks(3)
    assert ranks.cuda.devices == [CPU] * 3
    for group in ranks.groups:
        with group:
            group.check()
        group.close()
    assert ranks.nccl.ended == [("destroy", 0), ("destroy", 1), ("destroy", 2)]
    with pytest.raises(CollectiveError, match="all_reduce in group 'moe_ep', rank 0: the group was closed"):
        ranks.groups[0].all_reduce(torch.ones(2))


@pytest.mark.parametrize("function", ["ncclGetUniqueId", "ncclCommInitRank"])
def test_a_group_that_cannot_be_joined_says_why(function: str) -> None:
    nccl = NcclStandIn()
    nccl.fails[function] = 2
    with pytest.raises(CollectiveError, match=rf"^joining group 'moe_ep', rank 0: {function} failed: .* system error"):
        Ranks(2, nccl)


def test_a_rank_that_the_bootstrap_group_misses_is_named() -> None:
    bootstrap = SameProcess(1, 2, {})
    bootstrap.close()
    with pytest.raises(CollectiveError, match="joining group 'moe_ep', rank 1: broadcast in group 'bootstrap'"):
        PyNcclCommunicator(bootstrap, "moe_ep", 1, CPU, NcclLibrary(NcclStandIn(), ""), CudaStandIn())


@pytest.fixture
def stuck() -> Iterator[Callable[[], object]]:
    """Something that does not return before the test ends."""
    end = threading.Event()
    yield end.wait
    end.set()


def test_a_rank_that_dies_while_joining_keeps_nobody(stuck: Callable[[], object]) -> None:
    nccl = NcclStandIn()
    nccl.before["ncclCommInitRank"] = stuck
    with pytest.raises(CollectiveError, match=r"a rank failed: ncclCommInitRank did not return within 0.02 s"):
        Ranks(2, nccl)


@pytest.mark.parametrize("end", ["ncclCommDestroy", "ncclCommAbort"])
def test_nccl_holding_a_communicator_keeps_nobody(
    end: str, stuck: Callable[[], object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pynccl, "RELEASE_S", 0.02)
    ranks = Ranks(1)
    ranks.nccl.before[end] = stuck
    if end == "ncclCommAbort":
        ranks.nccl.async_error = 6
        with pytest.raises(CollectiveError, match="remote process exited"):
            ranks.groups[0].check()
    ranks.groups[0].close()
    assert "group 'moe_ep', rank 0: NCCL still holds its communicator after 0.02 s; a CUDA graph" in caplog.text


def test_a_communicator_that_nccl_cannot_free_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(1)
    ranks.nccl.fails["ncclCommDestroy"] = 1
    ranks.groups[0].close()
    assert "group 'moe_ep', rank 0: ncclCommDestroy failed: unhandled cuda error" in caplog.text
