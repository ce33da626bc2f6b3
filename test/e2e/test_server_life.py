"""The promises of the server as a set of processes: starting, stopping, and losing one of them."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from server_process import (
    DEMO_MODEL,
    Load,
    events,
    free_port,
    launch,
    parallel_flags,
    processes_of,
    shared_files,
    unread_stream,
    wait_for_load,
    wait_until_gone,
)

TWO_RANKS = parallel_flags(2)
LONG = {"text": "What is 17 plus 25?", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}, "stream": True}
PROBES = ["/health", "/ready", "/health_generate"]
RARE_TOKEN = 250
"""Of a byte that the model does not produce."""


def test_ctrl_c_ends_the_server_cleanly_with_nothing_left_behind(tmp_path):
    before = shared_files()
    with launch(tmp_path / "log", *TWO_RANKS) as server:
        ranks = server.rank_processes()
        assert len(ranks) == 2
        server.process.send_signal(signal.SIGINT)
        assert server.wait_for_exit() == 0
        wait_until_gone(ranks)
    assert shared_files() <= before


def test_ranks_keep_to_cores_of_their_own_unless_told_otherwise(tmp_path):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("needs two cores")
    with launch(tmp_path / "log", *TWO_RANKS) as server:
        first, second = (set(rank.cpu_affinity()) for rank in server.rank_processes())
        assert first and second and not first & second and first | second <= cores
    with launch(tmp_path / "log", *TWO_RANKS, "--cpu-binding", "off") as server:
        assert all(set(rank.cpu_affinity()) == cores for rank in server.rank_processes())


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path):
    body = {**LONG, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
    with launch(tmp_path / "log", *TWO_RANKS, "--drain-timeout", "100") as server:
        with server.client.stream("POST", "/generate", json=body) as response:
            stream = events(response)
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            refused = server.client.post("/generate", json={**body, "stream": False})
            assert refused.status_code == 503
            assert "Retry-After" in refused.headers
            assert [server.client.get(probe).status_code for probe in PROBES] == [200, 503, 503]
            last = list(stream)[-1]
        assert last["meta_info"]["completion_tokens"] == 300
        assert server.wait_for_exit() == 0


def test_what_is_not_finished_by_the_drain_timeout_is_told_so(tmp_path):
    with launch(tmp_path / "log", *TWO_RANKS, "--drain-timeout", "0.2") as server:
        with server.client.stream("POST", "/generate", json=LONG) as response:
            stream = events(response)
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            assert "longer than 0.2 s" in list(stream)[-1]["error"]["message"]
        assert server.wait_for_exit() == 0


def test_a_second_signal_stops_at_once_and_every_client_is_told(tmp_path):
    """Also when one of them does not read what it is sent."""
    with launch(tmp_path / "log", *TWO_RANKS, "--drain-timeout", "60") as server:
        ranks = server.rank_processes()
        load = Load(server, 12, LONG)
        with unread_stream(server, LONG):
            wait_for_load(server, 13)
            time.sleep(1)  # until there is more than it takes
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            server.process.send_signal(signal.SIGINT)
            assert load.outcomes() == ["engine_dead"] * 12
            assert server.wait_for_exit(8) == 0
        wait_until_gone(ranks)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("death", ["killed", "exit code 0"])
def test_the_death_of_a_rank_under_load_ends_the_server_in_time_and_every_client_is_told(tmp_path, death):
    """Also when one of them does not read what it is sent."""
    with launch(tmp_path / "log", *TWO_RANKS, faults=f"exit={RARE_TOKEN}") as server:
        ranks = server.rank_processes()
        load = Load(server, 200, {**LONG, "data_parallel_rank": 0})
        with unread_stream(server, LONG):
            wait_for_load(server, 201)
            started = time.monotonic()
            if death == "killed":
                ranks[1].kill()
            else:
                with contextlib.suppress(httpx.TransportError):
                    server.client.post("/generate", json={"input_ids": [RARE_TOKEN], "data_parallel_rank": 1})
            assert load.outcomes() == ["engine_dead"] * 200
            assert server.wait_for_exit(5) == 1
            assert time.monotonic() - started < 5
        wait_until_gone(ranks)


def test_the_death_of_an_idle_rank_ends_the_server_too(tmp_path):
    with launch(tmp_path / "log", *TWO_RANKS) as server:
        ranks = server.rank_processes()
        ranks[0].kill()
        assert server.wait_for_exit(5) == 1
        wait_until_gone(ranks)


def test_a_rank_that_hangs_ends_the_server_at_its_deadline_and_is_named_with_its_stack(tmp_path):
    with launch(tmp_path / "log", *TWO_RANKS, "--dist-timeout", "4") as server:
        ranks = server.rank_processes()
        with server.client.stream("POST", "/generate", json={**LONG, "data_parallel_rank": 0}) as response:
            stream = events(response)
            next(stream)
            ranks[1].suspend()
            last = list(stream)[-1]
        assert "rank 1 did not arrive within 4 s" in last["error"]["message"]
        assert server.wait_for_exit() == 1
        wait_until_gone(ranks)
    _, _, stack = server.log.read_text().partition("the engine died")
    assert "most recent call first" in stack and "rank_process.py" in stack


def test_a_silence_longer_than_the_deadline_of_gloo_harms_nobody(tmp_path):
    with launch(tmp_path / "log", *TWO_RANKS, "--dist-timeout", "6", "--cpu-collectives", "gloo") as server:
        server.generate(text="What is 2 plus 2?")
        time.sleep(8)
        for rank in range(2):
            server.generate(text="What is 2 plus 2?", data_parallel_rank=rank)


def test_a_server_killed_under_load_takes_its_ranks_with_it(tmp_path):
    with launch(tmp_path / "log", *TWO_RANKS) as server:
        ranks = server.rank_processes()
        with server.client.stream("POST", "/generate", json=LONG) as response:
            stream = events(response)  # kept: httpx closes a response whose iterator is dropped
            next(stream)
            server.process.kill()
            wait_until_gone(ranks)


def test_a_client_that_goes_away_ends_its_request(tmp_path):
    with launch(tmp_path / "log", *TWO_RANKS) as server:
        with server.client.stream("POST", "/generate", json=LONG) as response:
            stream = events(response)  # kept: httpx closes a response whose iterator is dropped
            next(stream)
            assert sum(server.info()["requests_per_rank"]) == 1
        deadline = time.monotonic() + 5
        while sum(server.info()["requests_per_rank"]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.info()["requests_per_rank"] == [0, 0]
        server.generate(text="What is 2 plus 2?")  # and the engine is well


def test_it_answers_health_but_is_not_ready_while_it_starts_and_shows_the_stage_that_is_stuck(tmp_path):
    flags = [*TWO_RANKS, "--startup-timeout", "5"]
    with launch(tmp_path / "log", *flags, ready=False, faults="stuck=loading weights") as server:
        statuses = set()
        while server.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                statuses.add(tuple(server.client.get(probe).status_code for probe in PROBES))
            time.sleep(0.1)
        assert (200, 503, 503) in statuses
        assert server.wait_for_exit() == 1
        assert processes_of(server.process.pid) == []
    log = server.log.read_text()
    stuck = "rank 0 is at 'loading weights', rank 1 is at 'loading weights'"
    assert f"not ready within --startup-timeout 5 s: {stuck}" in log
    assert "fault_injection.py" in log, "the stack shows the line"


def test_a_port_that_is_taken_is_an_error_with_the_way_out(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with launch(tmp_path / "log", "--port", str(taken.getsockname()[1]), ready=False) as server:
            assert server.wait_for_exit(30) == 1
        assert "choose another with --host and --port" in (tmp_path / "log").read_text()


def test_of_two_servers_that_want_one_port_one_serves_and_the_other_ends_before_it_loads_anything(tmp_path):
    port = ["--port", str(free_port())]
    with (
        launch(tmp_path / "log a", *port, ready=False) as first,
        launch(tmp_path / "log b", *port, ready=False) as second,
    ):
        while (codes := [first.process.poll(), second.process.poll()]) == [None, None]:
            assert "ready after" not in first.log.read_text() + second.log.read_text()
            time.sleep(0.05)
        assert sorted(codes, key=str) == [1, None]
        loser, winner = (first, second) if codes[0] == 1 else (second, first)
        log = loser.log.read_text()
        assert log.splitlines()[-1].endswith("choose another with --host and --port")
        assert "Loading weights" not in log and "Traceback" not in log
        deadline = time.monotonic() + 60
        while "ready after" not in winner.log.read_text():
            assert winner.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.parametrize("name", sorted(path.name for path in DEMO_MODEL.iterdir()))
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, name):
    folder = checkpoint_without(tmp_path / "model", name)
    content = (DEMO_MODEL / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert name in start_that_fails(tmp_path / "log", folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_an_incomplete_checkpoint_is_an_error_that_names_what_is_missing(tmp_path, name):
    assert name.removeprefix("model") in start_that_fails(
        tmp_path / "log", checkpoint_without(tmp_path / "model", name)
    )


def checkpoint_without(folder: Path, name: str) -> Path:
    folder.mkdir()
    for path in DEMO_MODEL.iterdir():
        if path.name != name:
            os.symlink(path, folder / path.name)
    return folder


def start_that_fails(log: Path, model: Path) -> str:
    """The one line that says why."""
    with launch(log, model=model, ready=False) as server:
        assert server.wait_for_exit(40) == 1
    text = log.read_text()
    assert "Traceback" not in text
    lines = text.splitlines()
    (reason,) = [line for line in lines if line.startswith("error: ") or " ERROR " in line]
    assert lines[-1] == reason
    return reason


def test_an_impossible_combination_is_refused_before_anything_starts(tmp_path):
    with launch(tmp_path / "log", "--tp", "2", "--dp", "2", ready=False) as server:
        assert server.wait_for_exit(30) == 1
    assert (tmp_path / "log").read_text().strip() == "error: --dp-size 2 needs --enable-dp-attention"
