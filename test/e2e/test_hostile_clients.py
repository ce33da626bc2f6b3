"""Clients that send what they should not, on one real server; `make fuzz` runs all of it for longer."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

import fuzz
from server_process import Server, launch

NUM_ATTACKS = 400
OFF_LIMITS = {"/start_profile", "/stop_profile"}
"""Routes that write files."""
AS_THE_SCHEMA_SAYS = [content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """After all that is done to it, the server is as well as before."""
    with launch(tmp_path_factory.mktemp("hostile") / "log", *fuzz.FLAGS) as server:
        ranks = server.info()["rank_process_ids"]
        yield server
        assert fuzz.problems_at_rest(server, ranks) == []


def test_nothing_that_a_raw_socket_sends_is_a_server_error_or_hangs(server):
    fuzzer = fuzz.Fuzzer(seed=1, field_names=fuzz.field_names(server))
    report = asyncio.run(fuzz.run_attacks(fuzzer, NUM_ATTACKS, 16, server.port))
    assert report.failures == []
    assert report.statuses[200] > NUM_ATTACKS / 10 and report.statuses[400] > NUM_ATTACKS / 4, report.statuses


def test_what_breaks_the_schema_is_no_server_error_and_is_answered_as_the_schema_says(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    attacked = [operation for operation in operations if operation.body and operation.path not in OFF_LIMITS]
    assert {operation.path for operation in attacked} >= {path for path, _ in fuzz.BODIES}
    cases = st.one_of([operation.as_strategy(generation_mode=GenerationMode.NEGATIVE) for operation in attacked])

    @given(case=cases)
    @settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=fuzz.ANSWER_SECONDS)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=AS_THE_SCHEMA_SAYS)

    check()


NATIVE = st.fixed_dictionaries(
    {"text": st.text(max_size=30), "sampling_params": st.fixed_dictionaries({"max_new_tokens": st.integers(-1, 6)})},
    optional={
        "stream": st.booleans(),
        "return_logprob": st.booleans(),
        "top_logprobs_num": st.integers(-1, 25),
        "rid": st.text(max_size=5),
        "data_parallel_rank": st.integers(-1, 2),
    },
)
REPEATS = r"(\(a|\(b|[ab]|\)?[{][0-9]{1,4},?[}]|[?*|)])+"
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(-1, 3),
        "top_p": st.floats(-0.5, 1.5),
        "top_k": st.integers(-2, 1000),
        "min_p": st.floats(-0.5, 1.5),
        "frequency_penalty": st.floats(-3, 3),
        "repetition_penalty": st.floats(-1, 3),
        "min_new_tokens": st.integers(-1, 8),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
        "stop_token_ids": st.lists(st.integers(-1, 900), max_size=3),
        "logit_bias": st.dictionaries(st.integers(-1, 900).map(str), st.floats(-200, 200), max_size=3),
        "sampling_seed": st.integers(-(2**64), 2**64),
        "ignore_eos": st.booleans(),
        "stop_regex": st.from_regex(REPEATS, fullmatch=True),
        "regex": st.from_regex(REPEATS, fullmatch=True),
        "json_schema": st.builds(dict, type=st.sampled_from(["string", "array", "object", "integer"])),
        "n": st.integers(0, 3),
    },
)


@given(request=NATIVE, sampling=SAMPLING)
@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)
def test_a_native_request_is_generated_as_asked_or_refused_with_the_field(server, request, sampling):
    """At the edges of every range, against the sampler and the scheduler themselves."""
    body = {**request, "sampling_params": {**request["sampling_params"], **sampling}}
    response = server.client.post("/generate", json=body)
    if response.status_code == 400:
        assert response.json()["error"]["message"]
        return
    assert response.status_code == 200, response.text
    if body.get("stream"):
        *events, done = response.text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        answers = [json.loads(event.removeprefix("data: ")) for event in events]
        assert all("error" not in answer for answer in answers)
    else:
        answers = response.json() if sampling.get("n", 1) > 1 else [response.json()]
        assert len(answers) == sampling.get("n", 1)
    longest = request["sampling_params"]["max_new_tokens"]
    assert all(answer["meta_info"]["completion_tokens"] <= longest for answer in answers)


def test_many_connections_that_say_nothing_keep_nobody_waiting(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(500)]
    half = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    for connection in idle[::2]:
        connection.sendall(half)
    started = time.monotonic()
    server.generate(text="Hi", sampling_params={"max_new_tokens": 2})
    assert time.monotonic() - started < 5
    for connection in idle:
        connection.close()


def test_a_client_that_reads_nothing_of_a_long_answer_does_not_make_the_server_grow(server):
    before = fuzz.memory(server)["server"]
    sampling = {"max_new_tokens": 200, "ignore_eos": True, "n": 30}
    body = {"text": "Hi", "stream": True, "return_logprob": True, "top_logprobs_num": 20, "sampling_params": sampling}
    content = json.dumps(body).encode()
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    for connection in connections:
        connection.sendall(fuzz.http_request("POST", "/generate", content))
    time.sleep(2)
    with httpx.Client(base_url=server.url) as other:
        assert other.get("/health").status_code == 200
    assert fuzz.memory(server)["server"] - before < 100 * 2**20
    for connection in connections:
        connection.close()
