"""The promises of the server as a set of processes: starting, stopping, and losing one of them."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

import nibble
from nibble.config.server_args import ServerArgs
from nibble.launch_server import _listen
from nibble.utils.errors import ConfigError
from rank_processes import free_port
from server_process import (
    DEMO_MODEL,
    Load,
    Server,
    events,
    launch,
    parallel_flags,
    shared_files,
    stopped,
    unread_stream,
    wait_for_load,
    wait_for_log,
    wait_until_gone,
)

TWO_RANKS = parallel_flags(2)
LONG = {"text": "What is 17 plus 25?", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}, "stream": True}
PROBES = ["/health", "/ready", "/health_generate"]
RARE_TOKEN = 250
"""Of a byte that the model does not produce."""
CORES = os.sched_getaffinity(0)
NEEDS_TWO_CORES = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


# Two servers on which something takes its time, while other tests run


STARTUP_TIMEOUT, GLOO_TIMEOUT = 30, 12


@pytest.fixture(scope="module")
def stuck(tmp_path_factory) -> Iterator[tuple[Server, list[psutil.Process]]]:
    """A server whose ranks do not get beyond a stage of their start, and these."""
    flags = [*TWO_RANKS, "--startup-timeout", str(STARTUP_TIMEOUT)]
    log = tmp_path_factory.mktemp("stuck") / "log"
    with launch(log, *flags, ready=False, faults="stuck=loading weights") as server:
        deadline = time.monotonic() + STARTUP_TIMEOUT
        ranks: list[psutil.Process] = []
        while len(ranks) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
            with contextlib.suppress(httpx.TransportError):
                ranks = server.rank_processes()
        yield server, ranks


@pytest.fixture(scope="module")
def silent(tmp_path_factory) -> Iterator[tuple[Server, float]]:
    """A server over gloo, left to all cores, that has had one request, and when that was."""
    flags = ["--cpu-collectives", "gloo", "--dist-timeout", str(GLOO_TIMEOUT), "--cpu-binding", "off"]
    with launch(tmp_path_factory.mktemp("silent") / "log", *TWO_RANKS, *flags) as server:
        server.generate(text="What is 2 plus 2?")
        yield server, time.monotonic()


def test_it_answers_health_but_is_not_ready_while_it_starts(stuck):
    server, _ = stuck
    assert [server.client.get(probe).status_code for probe in PROBES] == [200, 503, 503]


@NEEDS_TWO_CORES
def test_ranks_use_all_cores_if_told_so(silent):
    server, _ = silent
    assert [set(rank.cpu_affinity()) for rank in server.rank_processes()] == [CORES, CORES]


# One server, until it is killed


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with launch(tmp_path_factory.mktemp("server") / "log", *TWO_RANKS) as server:
        yield server


@NEEDS_TWO_CORES
def test_ranks_keep_to_cores_of_their_own(server):
    first, second = (set(rank.cpu_affinity()) for rank in server.rank_processes())
    assert first and second and not first & second and first | second <= CORES


def test_a_client_that_goes_away_ends_its_request(server):
    with server.client.stream("POST", "/generate", json=LONG) as response:
        stream = events(response)  # kept: httpx closes a response whose iterator is dropped
        next(stream)
        assert sum(server.info()["requests_per_rank"]) == 1
    deadline = time.monotonic() + 5
    while sum(server.info()["requests_per_rank"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.info()["requests_per_rank"] == [0, 0]
    server.generate(text="What is 2 plus 2?")  # and the engine is well


def test_a_server_killed_under_load_takes_its_ranks_with_it(server):
    ranks = server.rank_processes()
    with server.client.stream("POST", "/generate", json=LONG) as response:
        stream = events(response)  # kept: httpx closes a response whose iterator is dropped
        next(stream)
        server.process.kill()
        wait_until_gone(ranks)


# Servers that end


def test_ctrl_c_ends_the_server_cleanly_with_nothing_left_behind(tmp_path):
    before = shared_files()
    with launch(tmp_path / "log", *TWO_RANKS, forked=False) as server:
        ranks = server.rank_processes()
        assert len(ranks) == 2
        server.process.send_signal(signal.SIGINT)
        assert server.wait_for_exit() == 0
        wait_until_gone(ranks)
    assert shared_files() <= before


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path):
    body = {**LONG, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
    with launch(tmp_path / "log", *TWO_RANKS, "--drain-timeout", "100") as server:
        with server.client.stream("POST", "/generate", json=body) as response:
            stream = events(response)
            next(stream)
            with stopped(server.rank_processes()):
                server.process.send_signal(signal.SIGTERM)
                wait_for_log(server, "SIGTERM: finishing what runs")
                refused = server.client.post("/generate", json={**body, "stream": False})
                assert refused.status_code == 503
                assert "Retry-After" in refused.headers
                assert [server.client.get(probe).status_code for probe in PROBES] == [200, 503, 503]
            last = list(stream)[-1]
        assert last["meta_info"]["completion_tokens"] == 300
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
            wait_for_log(server, "SIGINT: finishing what runs")
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


def test_a_port_that_is_taken_is_an_error_with_the_way_out():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another with --host and --port"):
            _listen(ServerArgs(model_path=str(DEMO_MODEL), port=taken.getsockname()[1]))


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


# What can't be served

TRIED_ON_A_SERVER = ["tokenizer.json", "model.safetensors"]
"""The first is read by the server's own process, as all others are, the second by a rank."""


@pytest.mark.parametrize("name", sorted({path.name for path in DEMO_MODEL.iterdir()} - set(TRIED_ON_A_SERVER)))
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, name):
    assert name in refusal(damaged_checkpoint(tmp_path / "model", name))


@pytest.mark.parametrize("name", TRIED_ON_A_SERVER)
def test_a_server_that_finds_its_checkpoint_damaged_says_so_in_its_last_line(tmp_path, name):
    model = damaged_checkpoint(tmp_path / "model", name)
    with launch(tmp_path / "log", model=model, ready=False) as server:
        assert server.wait_for_exit(40) == 1
    text = server.log.read_text()
    assert "Traceback" not in text
    lines = text.splitlines()
    (reason,) = [line for line in lines if line.startswith("error: ") or " ERROR " in line]
    assert lines[-1] == reason
    assert name in reason


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_an_incomplete_checkpoint_is_an_error_that_names_what_is_missing(tmp_path, name):
    assert name in refusal(checkpoint_without(tmp_path / "model", name))


def checkpoint_without(folder: Path, name: str) -> Path:
    folder.mkdir()
    for path in DEMO_MODEL.iterdir():
        if path.name != name:
            os.symlink(path, folder / path.name)
    return folder


def damaged_checkpoint(folder: Path, name: str) -> Path:
    """With the first half of the file."""
    content = (DEMO_MODEL / name).read_bytes()
    (checkpoint_without(folder, name) / name).write_bytes(content[: len(content) // 2])
    return folder


def refusal(model: Path) -> str:
    """What a server prints as "error: …" before it ends."""
    with pytest.raises(ConfigError) as error:
        nibble.Engine(model_path=str(model), log_level="warning")
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_an_impossible_combination_is_refused_before_anything_starts(tmp_path):
    with launch(tmp_path / "log", "--tp", "2", "--dp", "2", ready=False, forked=False) as server:
        assert server.wait_for_exit(30) == 1
    assert (tmp_path / "log").read_text().strip() == "error: --dp-size 2 needs --enable-dp-attention"


# What took its time meanwhile


def test_a_silence_longer_than_the_deadline_of_gloo_harms_nobody(silent):
    server, silent_since = silent
    time.sleep(max(0.0, silent_since + GLOO_TIMEOUT + 2 - time.monotonic()))
    for rank in range(2):
        server.generate(text="What is 2 plus 2?", data_parallel_rank=rank)


def test_the_death_of_an_idle_rank_ends_the_server_too(silent):
    server, _ = silent
    ranks = server.rank_processes()
    ranks[0].kill()
    assert server.wait_for_exit(5) == 1
    wait_until_gone(ranks)


def test_a_start_that_is_stuck_ends_at_its_deadline_and_shows_the_stage(stuck):
    server, ranks = stuck
    assert server.wait_for_exit(STARTUP_TIMEOUT + 15) == 1
    wait_until_gone(ranks)
    log = server.log.read_text()
    stages = "rank 0 is at 'loading weights', rank 1 is at 'loading weights'"
    assert f"not ready within --startup-timeout {STARTUP_TIMEOUT} s: {stages}" in log
    assert "fault_injection.py" in log, "the stack shows the line"
