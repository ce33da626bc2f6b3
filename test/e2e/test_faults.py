"""What becomes of requests when something breaks or runs out: each is answered, and nobody else notices."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from server_process import (
    Load,
    Server,
    events,
    launch,
    parallel_flags,
    stopped,
    unread_stream,
    wait_for_load,
    wait_until_gone,
)

NAN, HANG, EXIT = 250, 251, 252
"""Tokens of bytes that the model does not produce."""
FAULTS = f"nan={NAN},hang={HANG},exit={EXIT}"
TWO_RANKS = parallel_flags(2)
PROMPT = [306, 271, 223, 19, 25, 298, 223, 20, 23, 33]
"""What is 17 plus 25?"""


def body(tokens: int, prompt: list[int] = PROMPT, **fields: object) -> dict:
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, **fields}


# One server, on which requests fail in every way that does not end it


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    flags = ["--max-running-requests", "2", "--max-queued-requests", "4", "--queue-timeout", "3"]
    flags += ["--context-length", "512", "--max-total-tokens", "640", "--enable-metrics"]
    with launch(tmp_path_factory.mktemp("faults") / "log", *TWO_RANKS, *flags, faults=FAULTS) as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_is_left(request) -> Iterator[None]:
    """After each test on the shared server no request runs, no KV page is held, and the same ranks are alive."""
    if "server" not in request.fixturenames:
        yield
        return
    server: Server = request.getfixturevalue("server")
    ranks = server.info()["rank_process_ids"]
    yield
    deadline = time.monotonic() + 10
    while sum(server.info()["requests_per_rank"]) or "num_used_tokens{" not in (text := metrics(server)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    while any(not line.endswith(" 0.0") for line in metrics(server).splitlines() if "num_used_tokens{" in line):
        assert time.monotonic() < deadline, text
        time.sleep(0.05)
    assert server.info()["rank_process_ids"] == ranks
    assert server.client.get("/health_generate").status_code == 200


def metrics(server: Server) -> str:
    return server.client.get("/metrics").text


def metric(server: Server, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics(server).splitlines() if line.startswith(f"{name}{{"))


def test_a_row_that_becomes_nan_ends_with_an_error_and_its_neighbours_do_not_notice(server):
    """The NaN goes through attention, the FP4 gather and the experts of both ranks."""
    expected = server.generate(**body(60))["text"]
    with ThreadPoolExecutor() as pool:
        neighbours = [pool.submit(server.generate, **body(60, data_parallel_rank=rank)) for rank in range(2)]
        poisoned = body(5, [*PROMPT[:4], NAN, *PROMPT[4:]], data_parallel_rank=0)
        response = server.client.post("/generate", json=poisoned)
        assert response.status_code == 500
        assert "not finite" in response.json()["error"]["message"]
        with server.client.stream("POST", "/generate", json={**poisoned, "stream": True}) as stream:
            assert stream.status_code == 500 or "not finite" in list(events(stream))[-1]["error"]["message"]
        assert [neighbour.result()["text"] for neighbour in neighbours] == [expected, expected]
    # Its pages go to others, and its prompt is in no cache.
    assert server.generate(**body(60, data_parallel_rank=0))["text"] == expected


def test_more_requests_than_the_kv_cache_holds_all_get_the_answer_that_they_would_get_alone(server):
    server.client.post("/flush_cache").raise_for_status()
    retracted = metric(server, "sglang:num_retracted_reqs")
    prompts = [[*PROMPT, 110 + index] for index in range(2)]
    alone = [server.generate(**body(450, prompt, data_parallel_rank=0))["output_ids"] for prompt in prompts]
    server.client.post("/flush_cache").raise_for_status()
    with ThreadPoolExecutor() as pool:
        together = list(pool.map(lambda prompt: server.generate(**body(450, prompt, data_parallel_rank=0)), prompts))
    assert [answer["output_ids"] for answer in together] == alone
    server.client.get("/health_generate")  # so that the ranks report
    assert metric(server, "sglang:num_retracted_reqs") > retracted


def test_a_full_queue_is_a_503_that_says_when_to_come_back(server):
    """Two run on each of two ranks and four wait."""
    with stopped(server.rank_processes()):
        load = Load(server, 8, body(40))
        wait_for_load(server, 8)
        for stream in (False, True):
            refused = server.client.post("/generate", json=body(1, stream=stream))
            assert refused.status_code == 503
            assert refused.headers["retry-after"].isdecimal()
            assert "--max-queued-requests" in refused.json()["error"]["message"]
    assert load.outcomes() == ["answer"] * 8


def test_who_waits_too_long_gets_a_503_and_who_runs_goes_on(server):
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(server.client.stream("POST", "/generate", json={**body(490), "stream": True}))
            for _ in range(4)
        ]
        assert [response.status_code for response in running] == [200] * 4
        with stopped(server.rank_processes()):
            refused = server.client.post("/generate", json=body(1))
        assert [list(events(response))[-1]["meta_info"]["completion_tokens"] for response in running] == [490] * 4
    assert refused.status_code == 503
    assert refused.headers["retry-after"].isdecimal()
    assert "--queue-timeout 3 s" in refused.json()["error"]["message"]


# Ranks that make no step


def test_the_watchdog_ends_a_server_whose_rank_hangs_and_shows_where(tmp_path):
    with launch(tmp_path / "log", *TWO_RANKS, "--watchdog-timeout", "2", faults=FAULTS) as server:
        ranks = server.rank_processes()
        load = Load(server, 4, body(1900))
        wait_for_load(server, 4)
        hanging = server.client.post("/generate", json=body(1, [HANG], data_parallel_rank=1))
        assert hanging.json()["error"]["code"] == "engine_dead"
        assert load.outcomes() == ["engine_dead"] * 4
        assert server.wait_for_exit(5) == 1
        wait_until_gone(ranks)
    log = (tmp_path / "log").read_text()
    assert "made no step for --watchdog-timeout 2 s" in log
    assert "fault_injection.py" in log, "the stack shows the line that hangs"


def test_the_watchdog_does_not_mind_silence_and_notices_a_single_rank_that_was_stopped(tmp_path):
    """Ranks asleep make no step, nor does a rank whose finished request has a client that does not read it."""
    with launch(tmp_path / "log", *TWO_RANKS, "--watchdog-timeout", "2") as server:
        with unread_stream(server, body(300)):
            wait_for_load(server, 1)
            while sum(server.info()["outstanding_tokens_per_rank"]):
                time.sleep(0.05)
            time.sleep(2.5)
            assert sum(server.info()["requests_per_rank"]) == 1, "it still waits for its client"
        ranks = server.rank_processes()
        load = Load(server, 4, body(1900))
        wait_for_load(server, 4)
        ranks[1].suspend()
        assert load.outcomes() == ["engine_dead"] * 4
        assert server.wait_for_exit(5) == 1
        wait_until_gone(ranks)
    log = (tmp_path / "log").read_text()
    assert "made no step for --watchdog-timeout 2 s" in log and "1 is stopped" in log
