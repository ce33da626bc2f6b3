"""Requests that wait for their grammar are requests like all others: they can be aborted, time out and are told."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count

import psutil
import pytest

from server_process import Load, Server, events, launch, parallel_flags, processes_of, wait_for_load

TWO_RANKS = parallel_flags(2)
WATCHDOG_S, QUEUE_S = 1, 4
_numbers = count()


def new_grammar(**fields: object) -> dict:
    """A request with a grammar that nobody has compiled yet, for at most 20 digits."""
    sampling = {"max_new_tokens": 30, "regex": f"x{next(_numbers)}:[0-9]{{1,20}}"}
    return {"text": "Hi", "sampling_params": sampling, **fields}


def trial_process(server: Server) -> psutil.Process:
    """Started for the first grammar, which on a busy machine may take longer than the queue timeout."""
    deadline = time.monotonic() + 60
    while server.client.post("/generate", json=new_grammar()).status_code != 200:
        assert time.monotonic() < deadline
    return next(child for child in processes_of(server.process.pid) if "grammar trial" in child.cmdline()[0])


@contextmanager
def endless_compiling(server: Server) -> Iterator[None]:
    """Until the block ends."""
    process = trial_process(server)
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):  # it has ended with the server
            process.resume()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    flags = [*TWO_RANKS, "--watchdog-timeout", str(WATCHDOG_S), "--queue-timeout", str(QUEUE_S)]
    with launch(tmp_path_factory.mktemp("grammars") / "log", *flags) as server:
        yield server


def test_the_watchdog_lets_an_idle_server_live_while_a_grammar_takes_its_time_and_the_queue_timeout_ends_it(server):
    """A rank that had never got the request was said to hang, and the server ended."""
    with endless_compiling(server):
        started = time.monotonic()
        refused = server.client.post("/generate", json=new_grammar())
    assert refused.status_code == 503 and f"--queue-timeout {QUEUE_S} s" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"].isdecimal()
    assert time.monotonic() - started > 3 * WATCHDOG_S
    assert server.generate(**new_grammar())["text"]


def test_a_request_that_waits_for_its_grammar_can_be_aborted(server):
    with endless_compiling(server), ThreadPoolExecutor() as pool:
        waiting = [
            pool.submit(server.generate, **new_grammar(rid="a")),
            pool.submit(server.generate, **new_grammar(rid="b")),
        ]
        wait_for_load(server, 2)
        for rid in ("b", "a"):
            server.client.post("/abort_request", json={"rid": rid}).raise_for_status()
        answers = [answer.result(QUEUE_S) for answer in waiting]
    assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort", "abort"]
    assert server.generate(**new_grammar())["text"]


@pytest.fixture(scope="module")
def patient_server(tmp_path_factory) -> Iterator[Server]:
    """Lets requests wait, until it is told to stop."""
    with launch(tmp_path_factory.mktemp("patient") / "log", *TWO_RANKS, "--drain-timeout", "0.2") as server:
        yield server


def test_the_death_of_the_process_that_compiles_harms_no_request_under_load(patient_server):
    """Its grammars were refused for ever, as if they took too much memory."""
    server = patient_server
    process = trial_process(server)
    process.suspend()
    requests = [new_grammar() for _ in range(4)]
    load = Load(server, 12, {"text": "Hi", "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}})
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(server.generate, **request) for request in requests]
        wait_for_load(server, 4)
        process.kill()
        answers = [answer.result() for answer in waiting]
    assert all(answer["text"] for answer in answers)
    assert load.outcomes() == ["answer"] * 12


def test_requests_that_run_or_wait_for_their_grammar_at_the_drain_timeout_are_told_so(patient_server):
    """Those that waited got a plain-text 500 when their tasks were cancelled."""
    server = patient_server
    long = {"text": "Hi", "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}, "stream": True}
    with (
        endless_compiling(server),
        ThreadPoolExecutor() as pool,
        server.client.stream("POST", "/generate", json=long) as response,
    ):
        running = events(response)
        next(running)
        bodies = [new_grammar(stream=stream) for stream in (False, True)]
        waiting = [pool.submit(server.client.post, "/generate", json=body) for body in bodies]
        wait_for_load(server, 3)
        server.process.terminate()
        assert "longer than 0.2 s" in list(running)[-1]["error"]["message"]
        answers = [answer.result() for answer in waiting]
        assert server.wait_for_exit() == 0
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        assert "longer than 0.2 s" in answer.json()["error"]["message"]
