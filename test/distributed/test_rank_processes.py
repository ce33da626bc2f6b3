"""The processes that the tests of several ranks run in. They must not hide a failure."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rank_processes
from rank_processes import Rank, RankFailure, RankProcesses, run_ranks


def describe(rank: Rank, **arguments: Any) -> dict[str, Any]:
    rank.state["calls"] = rank.state.get("calls", 0) + 1
    return {"rank": rank.rank, "of": rank.world_size, "calls": rank.state["calls"], "pid": os.getpid(), **arguments}


def fail_on_one(rank: Rank) -> None:
    if rank.rank == 1:
        raise KeyError("the reason")


def die_on_one(rank: Rank, exit_code: int) -> None:
    if rank.rank == 1:
        os._exit(exit_code)


def hang_on_one(rank: Rank) -> None:
    while rank.rank == 1:
        pass


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[RankProcesses]:
    with RankProcesses(2, tmp_path, timeout_s=20) as processes:
        yield processes


def test_each_rank_is_a_process_that_keeps_its_state(ranks: RankProcesses) -> None:
    first, second = ranks.run(describe, words=["a", "b"]), ranks.run(describe, ranks=[1])
    assert [(answer["rank"], answer["of"], answer["words"]) for answer in first] == [
        (0, 2, ["a", "b"]),
        (1, 2, ["a", "b"]),
    ]
    assert len({os.getpid(), first[0]["pid"], first[1]["pid"]}) == 3
    assert second == [{"rank": 1, "of": 2, "calls": 2, "pid": first[1]["pid"]}]


def test_a_rank_that_raises_fails_the_call_with_its_traceback(ranks: RankProcesses) -> None:
    with pytest.raises(RankFailure, match=r"rank 1: (?s:.*)KeyError: 'the reason'"):
        ranks.run(fail_on_one)


@pytest.mark.parametrize("exit_code", [0, 7])
def test_a_rank_that_exits_fails_the_call(ranks: RankProcesses, exit_code: int) -> None:
    with pytest.raises(RankFailure, match=f"rank 1: the process ended with exit code {exit_code}"):
        ranks.run(die_on_one, exit_code=exit_code)


def test_a_rank_that_hangs_fails_the_call(ranks: RankProcesses) -> None:
    ranks.timeout_s = 1
    with pytest.raises(RankFailure, match="rank 1: no answer"):
        ranks.run(hang_on_one)


def test_processes_start_afresh_after_a_failure(ranks: RankProcesses) -> None:
    before, run_dir = ranks.run(describe), ranks.run_dir
    with pytest.raises(RankFailure):
        ranks.run(die_on_one, exit_code=1)
    after = ranks.run(describe)
    assert [answer["calls"] for answer in after] == [1, 1]
    assert {answer["pid"] for answer in before}.isdisjoint(answer["pid"] for answer in after)
    assert ranks.run_dir != run_dir


def test_no_process_is_left_when_a_run_ends(tmp_path: Path) -> None:
    pids = [answer["pid"] for answer in run_ranks(describe, 2, tmp_path)]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_processes_end_by_themselves_but_not_later_than_all_have_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_processes, "END_S", 2.0)
    with RankProcesses(2, tmp_path) as processes:
        processes.run(describe)
        children = [process for process, _ in processes._processes.values()]
        processes.start(hang_on_one)
        processes.results(ranks=[0])
    assert [child.returncode for child in children] == [0, -signal.SIGKILL]
