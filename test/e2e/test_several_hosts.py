"""One engine over several hosts: here all are this machine, each with processes and files of its own."""

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import nibble
from nibble.utils.errors import ConfigError
from server_process import (
    DEMO_MODEL,
    Server,
    events,
    launch,
    parallel_flags,
    shared_files,
    wait_for_log,
    wait_until_gone,
)

QUESTIONS = ["What is 17 plus 25?", "What is 9 minus 4?", "Tom has 12 apples and buys 30 more. How many does he have?"]
GREEDY = {"temperature": 0, "max_new_tokens": 32}
LONG = {"text": "What is 2 plus 2?", "stream": True, "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
SHORTER = {**LONG, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
EVERY_RANK = range(4)


def free_address() -> str:
    """With a free port behind it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return f"127.0.0.1:{port}"


@contextmanager
def two_hosts(folder: Path, *flags: str, ranks: int = 4) -> Iterator[tuple[Server, Server]]:
    """The server, and the other host."""
    shared = [*parallel_flags(ranks), "--nnodes", "2", "--dist-init-addr", free_address(), *flags]
    with (
        launch(folder / "node1", *shared, "--node-rank", "1", ready=False) as other,
        launch(folder / "node0", *shared) as server,
    ):
        yield server, other


def ranks_of(host: Server) -> list[psutil.Process]:
    children = psutil.Process(host.process.pid).children(recursive=True)
    return [child for child in children if "nibble rank" in " ".join(child.cmdline())]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    with two_hosts(tmp_path_factory.mktemp("hosts"), "--enable-metrics") as both:
        yield both


def test_every_rank_answers_as_on_one_host(hosts: tuple[Server, Server]) -> None:
    server, other = hosts
    with nibble.Engine(model_path=str(DEMO_MODEL), log_level="warning") as engine:
        expected = engine.generate(QUESTIONS, GREEDY)
    for rank in EVERY_RANK:
        answers = server.client.post(
            "/generate", json={"text": QUESTIONS, "sampling_params": GREEDY, "data_parallel_rank": rank}
        ).json()
        assert [answer["text"] for answer in answers] == [answer["text"] for answer in expected]
        assert {answer["meta_info"]["dp_rank"] for answer in answers} == {rank}
    assert len(ranks_of(server)) == len(ranks_of(other)) == 2
    assert "FP4 all-gather is on" in server.log.read_text()


def test_answers_that_a_grammar_holds_come_from_other_hosts_too(hosts: tuple[Server, Server]) -> None:
    server, _ = hosts
    for rank in EVERY_RANK:
        sampling = {"temperature": 0, "max_new_tokens": 8, "regex": "(yes|no)"}
        answer = server.generate(text="Is it?", sampling_params=sampling, data_parallel_rank=rank)
        assert answer["text"] in ("yes", "no")


def test_the_cache_of_every_rank_is_flushed_and_metrics_are_those_of_all(hosts: tuple[Server, Server]) -> None:
    server, _ = hosts
    prompt = {"text": "What is 17 plus 25? " * 10, "sampling_params": GREEDY}
    for cached in (False, True, True):
        for rank in EVERY_RANK:
            answer = server.generate(**prompt, data_parallel_rank=rank)
            assert (answer["meta_info"]["cached_tokens"] > 0) == cached
    assert server.client.post("/flush_cache").status_code == 200
    for rank in EVERY_RANK:
        assert server.generate(**prompt, data_parallel_rank=rank)["meta_info"]["cached_tokens"] == 0
    metrics = server.client.get("/metrics").text
    assert all(f'dp_rank="{rank}"' in metrics for rank in EVERY_RANK)


def test_sigterm_to_the_server_lets_requests_finish_on_all_hosts_and_ends_them_cleanly(tmp_path: Path) -> None:
    before = shared_files()
    with two_hosts(tmp_path, ranks=2) as (server, other):
        ranks = ranks_of(server) + ranks_of(other)
        with server.client.stream("POST", "/generate", json={**SHORTER, "data_parallel_rank": 1}) as response:
            stream = events(response)
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            last = list(stream)[-1]
        assert last["meta_info"]["finish_reason"]["type"] == "length"
        assert server.wait_for_exit() == other.wait_for_exit() == 0
        wait_until_gone(ranks)
    assert shared_files() <= before


@pytest.mark.parametrize("death", ["of its process", "of its rank", "of the server"])
def test_the_death_of_a_host_ends_the_others_and_every_client_is_told(tmp_path: Path, death: str) -> None:
    with two_hosts(tmp_path, ranks=2) as (server, other):
        ranks = ranks_of(server) + ranks_of(other)
        if death == "of the server":
            server.process.kill()
            assert other.wait_for_exit() == 1
            wait_for_log(other, "the first host is lost")
        else:
            with server.client.stream("POST", "/generate", json={**LONG, "data_parallel_rank": 1}) as response:
                stream = events(response)
                next(stream)
                (other.process if death == "of its process" else ranks_of(other)[0]).kill()
                last = list(stream)[-1]
            # Or what the other rank says of it, should that be first on a slow machine.
            expected = "node 1 is lost" if death == "of its process" else "rank 1 ended unexpectedly (exit code -9)"
            assert any(words in last["error"]["message"] for words in (expected, "no word from rank 1"))
            assert server.wait_for_exit() == 1
            other.wait_for_exit()
        wait_until_gone(ranks)


def test_a_rank_of_another_host_that_hangs_is_named(tmp_path: Path) -> None:
    with two_hosts(tmp_path, "--watchdog-timeout", "3", ranks=2) as (server, other):
        with server.client.stream("POST", "/generate", json={**LONG, "data_parallel_rank": 1}) as response:
            stream = events(response)
            next(stream)
            ranks_of(other)[0].suspend()
            last = list(stream)[-1]
        assert "rank 1 made no step for --watchdog-timeout 3 s" in last["error"]["message"]
        assert "1 is stopped" in last["error"]["message"]
        assert server.wait_for_exit() == other.wait_for_exit() == 1
    _, _, stack = other.log.read_text().partition("the engine died")
    assert "most recent call first" in stack and "rank_process.py" in stack


def test_hosts_with_different_flags_refuse_each_other(tmp_path: Path) -> None:
    flags = [*parallel_flags(2), "--nnodes", "2", "--dist-init-addr", free_address()]
    with (
        launch(tmp_path / "node0", *flags, ready=False) as server,
        launch(tmp_path / "node1", *flags, "--node-rank", "1", "--page-size", "32", ready=False) as other,
    ):
        assert server.wait_for_exit(30) == other.wait_for_exit(30) == 1
        for host in (server, other):
            assert "node 1: --page-size is 32 there, and 16 on the first host" in host.log.read_text()


def test_whoever_comes_first_waits_and_says_for_whom(tmp_path: Path) -> None:
    flags = [*parallel_flags(2), "--nnodes", "2", "--dist-init-addr", free_address(), "--startup-timeout", "3"]
    with launch(tmp_path / "node0", *flags, ready=False) as server:
        wait_for_log(server, "waiting for node 1 at 127.0.0.1:")
        assert server.wait_for_exit(30) == 1
        assert "no word from node 1 within --startup-timeout 3 s" in server.log.read_text()


def test_only_the_first_node_can_be_an_engine() -> None:
    with pytest.raises(ConfigError, match=r"start the other nodes with python -m nibble\.launch_server"):
        nibble.Engine(
            model_path=str(DEMO_MODEL), tp_size=2, dp_size=2, ep_size=2, enable_dp_attention=True,
            nnodes=2, node_rank=1, dist_init_addr="127.0.0.1:5000",
        )  # fmt: skip
