"""The collectives of the CPU backends, checked on real processes against plain torch."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import communicator_ranks as on_rank
from nibble.distributed.communicator import CollectiveError, Communicator, PeerError, SingleRankCommunicator
from nibble.distributed.gloo import GlooCommunicator, open_store
from nibble.distributed.shared_memory import SharedMemoryCommunicator
from rank_processes import RankProcesses, free_port

WORLDS = [(backend, world) for backend in ("gloo", "shared_memory") for world in (4, 3, 2, 1)] + [("single", 1)]
"""The most ranks first, so that their processes start at once."""
BACKENDS = pytest.mark.parametrize("backend", ["gloo", "shared_memory"])
ON_EACH = pytest.mark.parametrize(("backend", "world_size"), WORLDS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    with RankProcesses(4, tmp_path_factory.mktemp("ranks")) as processes:
        yield processes


def all_distributions(world_size: int) -> list[list[int]]:
    """Rows per rank: even, uneven, one rank empty in turn, one rank with everything, all empty."""
    uneven = [3, 1, 6, 2][:world_size]
    one_empty = [[0 if r == empty else rows for r, rows in enumerate(uneven)] for empty in range(world_size)]
    one_full = [[5 if r == full else 0 for r in range(world_size)] for full in range(world_size)]
    return [[4] * world_size, uneven, *one_empty, *one_full, [0] * world_size]


# --- What the collectives return


@ON_EACH
def test_gathers_return_every_ranks_rows_in_rank_order(ranks: RankProcesses, backend: str, world_size: int) -> None:
    for sizes in all_distributions(world_size):
        ranks.run(on_rank.check_gathers, ranks=range(world_size), backend=backend, world_size=world_size, sizes=sizes)


@ON_EACH
def test_a_list_of_tensors_travels_together(ranks: RankProcesses, backend: str, world_size: int) -> None:
    for sizes in all_distributions(world_size):
        ranks.run(
            on_rank.check_list_gather, ranks=range(world_size), backend=backend, world_size=world_size, sizes=sizes
        )


@ON_EACH
def test_a_prepared_gather_takes_what_the_memory_holds_at_each_call(
    ranks: RankProcesses, backend: str, world_size: int
) -> None:
    ranks.run(on_rank.check_prepared_gather, ranks=range(world_size), backend=backend, world_size=world_size)


@ON_EACH
def test_reductions_equal_the_sum_in_fp64(ranks: RankProcesses, backend: str, world_size: int) -> None:
    for sizes in all_distributions(world_size):
        ranks.run(
            on_rank.check_reductions, ranks=range(world_size), backend=backend, world_size=world_size, sizes=sizes
        )


@ON_EACH
def test_an_all_to_all_returns_every_ranks_rows_for_this_one_in_rank_order(
    ranks: RankProcesses, backend: str, world_size: int
) -> None:
    distributions = all_distributions(world_size)
    ranks.run(
        on_rank.check_all_to_alls,
        ranks=range(world_size),
        backend=backend,
        world_size=world_size,
        distributions=distributions,
    )


@ON_EACH
def test_broadcast_overwrites_every_rank_with_the_source(ranks: RankProcesses, backend: str, world_size: int) -> None:
    ranks.run(on_rank.check_broadcasts, ranks=range(world_size), backend=backend, world_size=world_size)


@BACKENDS
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("elements", [40, 150_000])
def test_sums_have_the_same_bits_whoever_owns_them_and_on_both_backends(
    ranks: RankProcesses, backend: str, world_size: int, elements: int
) -> None:
    ranks.run(
        on_rank.check_order_of_sums,
        ranks=range(world_size),
        backend=backend,
        world_size=world_size,
        elements=elements,
    )


@BACKENDS
@pytest.mark.parametrize("world_size", [2, 3])
def test_payloads_larger_than_the_buffer_arrive_whole(ranks: RankProcesses, backend: str, world_size: int) -> None:
    ranks.run(on_rank.check_large_payloads, ranks=range(world_size), backend=backend, world_size=world_size)


OPERATIONS = st.fixed_dictionaries(
    {
        "collective": st.sampled_from(
            ["all_gatherv", "reduce_scatterv", "all_to_allv", "all_gather", "all_reduce", "broadcast", "barrier"]
        ),
        "sizes": st.lists(st.integers(0, 60), min_size=3, max_size=3),
        "pauses_ms": st.lists(st.sampled_from([0, 0, 0, 1, 3]), min_size=3, max_size=3),
    }
)


@BACKENDS
def test_no_sequence_of_collectives_mixes_up_data_however_the_ranks_dawdle(ranks: RankProcesses, backend: str) -> None:
    @settings(
        max_examples=12,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(OPERATIONS, min_size=15, max_size=20))
    def check(program: list[dict[str, object]]) -> None:
        ranks.run(on_rank.run_program, ranks=range(3), backend=backend, world_size=3, program=program)

    check()


@BACKENDS
def test_two_groups_in_one_process_do_not_mix(ranks: RankProcesses, backend: str) -> None:
    ranks.run(on_rank.use_two_groups, backend=backend, port=free_port())


def test_a_group_of_one_copies_nothing() -> None:
    group = SingleRankCommunicator("dp")
    x = torch.ones(3, 2)
    assert group.all_reduce(x) is x
    assert group.all_gather(x) is x
    assert group.reduce_scatter(x) is x
    assert group.all_gatherv([x], [3])[0] is x
    assert group.reduce_scatterv(x, [3]) is x
    assert group.all_to_allv(x, [3]) is x


# --- What is refused before anything is sent


class RecordingCommunicator(Communicator):
    """Rank 1 of a group of three that only notes which collectives would have been sent."""

    def __init__(self) -> None:
        super().__init__(rank=1, world_size=3, name="moe_ep")
        self.sent: list[str] = []
        self.error: BaseException | None = None

    def close(self) -> None:
        super().close()

    def _note(self, collective: str) -> None:
        self.sent.append(collective)
        if self.error:
            raise self.error

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        self._note("all_gatherv")
        return list(tensors)

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self._note("reduce_scatterv")
        return x

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self._note("all_to_allv")
        return x

    def _broadcast(self, x: Tensor, src: int) -> None:
        self._note("broadcast")

    def _barrier(self) -> None:
        self._note("barrier")


ROWS = torch.ones(4, 2)
REFUSED = {
    "fewer sizes than ranks": (lambda c: c.all_gatherv(ROWS, [4, 4]), "all_gatherv", "2 entries, expected 3"),
    "more sizes than ranks": (lambda c: c.reduce_scatterv(ROWS, [1] * 4), "reduce_scatterv", "4 entries, expected 3"),
    "rows of another rank": (lambda c: c.all_gatherv(ROWS, [4, 5, 4]), "all_gatherv", r"4 rows, expected sizes\[1\]"),
    "a sum of another step": (lambda c: c.reduce_scatterv(ROWS, [1, 2, 3]), "reduce_scatterv", "4 rows, expected 6"),
    "rows of another step": (lambda c: c.all_to_allv(ROWS, [1, 2, 3]), "all_to_allv", "4 rows, expected 6"),
    "a negative size": (lambda c: c.all_gatherv(ROWS, [1, 4, -1]), "all_gatherv", "not be negative"),
    "unequal rows in a list": (lambda c: c.all_gatherv([ROWS, ROWS[1:]], [1, 4, 1]), "all_gatherv", "tensor 1 has 3"),
    "an empty list": (lambda c: c.all_gatherv([], [1, 4, 1]), "all_gatherv", "at least one tensor"),
    "columns of a matrix": (lambda c: c.all_gather(ROWS[:, :1]), "all_gather", r"contiguous.*\(4, 1\)"),
    "a scalar": (lambda c: c.all_gather(torch.tensor(1)), "all_gather", "scalar"),
    "indivisible rows": (lambda c: c.reduce_scatter(ROWS), "reduce_scatter", "multiple of 3, got 4"),
    "a sum of booleans": (lambda c: c.all_reduce(ROWS.bool()), "all_reduce", "cannot sum torch.bool"),
    "a sum of fp8": (
        lambda c: c.reduce_scatterv(ROWS.to(torch.float8_e4m3fn), [1, 1, 2]),
        "reduce_scatterv",
        "cannot sum torch.float8_e4m3fn",
    ),
    "an unknown source": (lambda c: c.broadcast(ROWS, src=3), "broadcast", "between 0 and 2, got 3"),
    "another device": (lambda c: c.all_reduce(ROWS.to("meta")), "all_reduce", "on cpu, got one on meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name_and_nothing_is_sent(case: str) -> None:
    call, collective, reason = REFUSED[case]
    group = RecordingCommunicator()
    with pytest.raises(ValueError, match=f"^{collective} in group 'moe_ep', rank 1: .*{reason}"):
        call(group)
    assert group.sent == []
    group.barrier()


def test_gather_sizes_taken_from_another_group_are_refused(ranks: RankProcesses) -> None:
    with pytest.raises(ValueError, match="sizes has 2 entries, expected 3"):
        RecordingCommunicator().all_gatherv(ROWS, sizes=[4, 4])
    # Where own rows and the sum fit by chance only the ranks together can see it.
    messages = ranks.run(on_rank.disagree_on_sizes, ranks=range(3), name="other-sizes")
    assert all("reduce_scatterv in group 'other-sizes'" in message for message in messages)
    assert any("other sizes, shapes or dtypes" in message for message in messages)


def test_an_idle_rank_with_zero_rows_still_enters() -> None:
    group = RecordingCommunicator()
    group.all_gatherv(torch.ones(0, 2), [3, 0, 0])
    group.all_gatherv([torch.ones(0, 2), torch.ones(0)], [0, 0, 1])
    group.reduce_scatterv(torch.ones(3, 2), [3, 0, 0])
    group.all_to_allv(torch.ones(3, 2), [3, 0, 0])
    assert group.sent == ["all_gatherv", "all_gatherv", "reduce_scatterv", "all_to_allv"]


def test_nothing_travels_when_every_rank_has_zero_rows() -> None:
    group = RecordingCommunicator()
    empty = torch.ones(0, 2)
    assert group.all_gatherv(empty, [0, 0, 0]).shape == (0, 2)
    assert [x.dtype for x in group.all_gatherv([empty, empty.int()], [0, 0, 0])] == [torch.float32, torch.int32]
    assert group.reduce_scatterv(empty, [0, 0, 0]).shape == (0, 2)
    assert group.all_to_allv(empty, [0, 0, 0]).shape == (0, 2)
    assert group.all_reduce(empty).shape == (0, 2)
    assert group.all_gather(empty).shape == (0, 2)
    assert group.sent == []


# --- When a peer fails


@pytest.mark.parametrize("error", [PeerError("rank 2 left"), KeyboardInterrupt(), MemoryError()])
def test_a_group_left_half_way_refuses_every_later_call(error: BaseException) -> None:
    group = RecordingCommunicator()
    group.error = error
    with pytest.raises((CollectiveError, KeyboardInterrupt, MemoryError)):
        group.barrier()
    group.error = None
    with pytest.raises(CollectiveError, match="all_reduce in group 'moe_ep', rank 1: barrier in group 'moe_ep'"):
        group.all_reduce(ROWS)
    assert group.sent == ["barrier"]


def test_a_closed_group_refuses_calls_and_may_be_closed_again() -> None:
    group = SingleRankCommunicator("dp")
    group.close()
    group.close()
    with pytest.raises(CollectiveError, match="all_gather in group 'dp', rank 0: the group was closed"):
        group.all_gather(ROWS)


@BACKENDS
def test_a_rank_that_does_not_come_to_dp_sync_is_named_when_the_deadline_is_over(
    ranks: RankProcesses, backend: str
) -> None:
    name = f"silence-{backend}"
    *waiting, _ = ranks.run(on_rank.stay_away, ranks=range(3), backend=backend, world_size=3, name=name)
    for rank, (first, second) in enumerate(waiting):
        assert re.match(f"all_gather in group '{name}', rank {rank}: .*0.5 s", first)
        assert first in second
        assert first.endswith("rank 2 did not arrive within 0.5 s" if backend == "shared_memory" else "from rank 2")


@BACKENDS
def test_nobody_waits_for_ever_for_a_rank_that_does_not_join(ranks: RankProcesses, backend: str) -> None:
    name = f"absence-{backend}"
    messages = ranks.run(on_rank.join_without_the_last, ranks=range(2), backend=backend, world_size=3, name=name)
    for rank, message in enumerate(messages):
        assert message == f"joining group '{name}', rank {rank}: rank 2 did not arrive within 0.5 s"
    if backend == "shared_memory":
        assert not list(ranks.run_dir.glob(f"{name}*"))


def test_a_peer_killed_amid_collectives_is_seen_by_all_others(tmp_path: Path) -> None:
    with RankProcesses(3, tmp_path) as processes:
        processes.start(on_rank.call_until_a_peer_dies, world_size=3)
        while len(list(processes.run_dir.glob("*-is-running"))) < 3:
            time.sleep(0.01)
        processes.kill(2)
        for rank, messages in enumerate(processes.results([0, 1])):
            assert messages["gloo"].startswith(f"all_gatherv in group 'gloo', rank {rank}: ")
            assert messages["shared_memory"].startswith(f"all_gatherv in group 'shared_memory', rank {rank}: ")
            assert "rank 2 left the group" in messages["shared_memory"]


def test_a_rank_that_comes_too_late_learns_why_nobody_waits_any_more(ranks: RankProcesses) -> None:
    first, late = ranks.run(on_rank.come_late, ranks=range(2), name="late")
    assert first == "barrier in group 'late', rank 0: rank 1 did not arrive within 0.5 s"
    assert late == f"barrier in group 'late', rank 1: rank 0 gave up: {first}"


def test_ranks_in_different_collectives_get_an_error_not_each_others_bytes(ranks: RankProcesses) -> None:
    messages = ranks.run(on_rank.enter_different_collectives, ranks=range(2), name="out-of-step")
    assert any("round 1, barrier" in message and "round 1, all_gather" in message for message in messages)


def test_shared_memory_of_uneven_sizes_across_ranks_is_refused_instead_of_a_deadlock(ranks: RankProcesses) -> None:
    messages = ranks.run(on_rank.join_with, ranks=range(2), name="unequal", buffer_bytes=[4096, 8192])
    assert "rank 1 has (world_size, buffer_bytes) [2, 8192], expected [2, 4096]" in messages[0]
    assert "rank 0 has (world_size, buffer_bytes) [2, 4096], expected [2, 8192]" in messages[1]


# --- What a group leaves behind, and where it listens


def test_no_file_is_left_once_all_have_joined_not_even_with_a_long_path(ranks: RankProcesses, tmp_path: Path) -> None:
    run_dir = tmp_path / ("deep" * 30)  # longer than a socket's path may be
    run_dir.mkdir(mode=0o700)
    assert ranks.run(on_rank.join_in_directory, ranks=range(2), run_dir=str(run_dir)) == [[], []]
    assert ranks.run(on_rank.shared_memory_files, ranks=range(2)) == [[], []]


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    with pytest.raises(ValueError, match="mode 0700"):
        SharedMemoryCommunicator(0, 2, tmp_path, "dp", timeout_s=1)


@pytest.mark.parametrize("name", ["", "../dp", "a/b", "x" * 65])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="group's name"):
        SharedMemoryCommunicator(0, 2, tmp_path, name, timeout_s=1)


def test_a_group_name_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dp.0").touch()
    with pytest.raises(CollectiveError, match=r"joining group 'dp', rank 0: .*dp.0 exists"):
        SharedMemoryCommunicator(0, 2, tmp_path, "dp", timeout_s=1)
    assert (tmp_path / "dp.0").exists()


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_group_is_refused(tmp_path: Path, rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank must be between 0 and 1, got {rank}"):
        SharedMemoryCommunicator(rank, 2, tmp_path, "dp", timeout_s=1)


@pytest.mark.parametrize("address", ["29500", "tcp://:29500", "tcp://host", "file://relative/path", "http://h:1"])
def test_an_address_that_is_no_store_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="file:///path or tcp://host:port"):
        open_store(address, rank=0, world_size=2, timeout_s=1)


def test_gloo_and_its_store_listen_only_on_the_address_given() -> None:
    port = free_port()
    store = open_store(f"tcp://127.0.0.1:{port}", rank=0, world_size=1, timeout_s=5)
    with GlooCommunicator(0, 1, store, "dp", timeout_s=5):
        listening = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert port in {connection.laddr.port for connection in listening}
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}
