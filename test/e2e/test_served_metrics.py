"""/metrics and the logs of a real server on two ranks, beside what its clients know."""

import json
import time
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server_process import Server, events, launch, parallel_flags

MOE_LAYERS, HIDDEN, TOP_K = 4, 256, 4  # of the demo model
WIRE_ROW = 176  # bytes: 256 e2m1 values, 16 scales, 4 ids, 4 weights
PLAIN_ROW = 4 * HIDDEN + 8 * TOP_K
FLAGS = [*parallel_flags(2), "--enable-metrics", "--log-format", "json", "--log-level", "debug", "--log-requests"]
IDLE_GAUGES = ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:num_used_tokens", "sglang:gen_throughput")


def samples(server: Server) -> dict[tuple[str, str | None], float]:
    """Values by name and rank; what is told per reason or route is summed."""
    response = server.client.get("/metrics")
    assert response.status_code == 200
    values: dict[tuple[str, str | None], float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("dp_rank"))
            values[key] = values.get(key, 0) + sample.value
    return values


def by_rank(server: Server, name: str) -> list[float]:
    values = samples(server)
    return [values[name, str(rank)] for rank in range(2)]


def wait_until_idle(server: Server) -> None:
    deadline = time.monotonic() + 20
    while any(any(by_rank(server, name)) for name in IDLE_GAUGES):
        assert time.monotonic() < deadline, f"still not idle: {[by_rank(server, name) for name in IDLE_GAUGES]}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with launch(tmp_path_factory.mktemp("metrics") / "log", *FLAGS) as server:
        yield server


def test_counters_add_up_with_what_was_asked_and_answered(server):
    before = samples(server)
    answers = [
        server.generate(
            text="What is 17 plus 25?",
            data_parallel_rank=rank,
            sampling_params={"max_new_tokens": 20 + rank, "temperature": 0, "ignore_eos": True},
        )["meta_info"]
        for rank in (0, 1, 1)
    ]
    body = {"prompt": "What is 2 plus 2?", "max_tokens": 70, "temperature": 0, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        usage = list(events(response))[-1]["usage"]
    wait_until_idle(server)
    after = samples(server)
    grown = {name: value - before.get((name, rank), 0) for (name, rank), value in after.items() if rank is None}

    prompt = sum(answer["prompt_tokens"] for answer in answers) + usage["prompt_tokens"]
    generated = sum(answer["completion_tokens"] for answer in answers) + usage["completion_tokens"]
    cached = sum(answer["cached_tokens"] for answer in answers) + usage["prompt_tokens_details"]["cached_tokens"]
    assert generated == 20 + 21 + 21 + 70
    assert grown["sglang:prompt_tokens_total"] == prompt
    assert grown["sglang:generation_tokens_total"] == generated
    assert grown["sglang:cached_tokens_total"] == cached
    assert grown["nibble:finished_requests_total"] == grown["sglang:num_requests_total"] == 4
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "queue_time_seconds"):
        assert grown[f"sglang:{name}_count"] == 4
    assert 0 < grown["sglang:inter_token_latency_seconds_count"] <= generated - 4, "some may come with the first"

    # A generation's last token is never an input, and what is cached is not computed.
    rows = prompt - cached + generated - 4
    ranks = {
        name: [after[name, str(rank)] - before[name, str(rank)] for rank in range(2)]
        for name, rank in after
        if rank == "0"
    }
    assert sum(ranks["nibble:rows_per_step_sum"]) == rows
    first, second = ranks["nibble:rows_per_step_sum"]
    assert first > 0 and second > 0
    assert ranks["nibble:dispatched_bytes_total"] == [count * WIRE_ROW * MOE_LAYERS for count in (first, second)]
    assert ranks["nibble:combined_bytes_total"] == [count * 4 * HIDDEN * MOE_LAYERS for count in (second, first)]
    assert len(set(ranks["nibble:rows_per_step_count"])) == 1, "the ranks step together"
    assert all(seconds > 0 for seconds in ranks["nibble:dp_sync_seconds_total"])


def test_gauges_of_a_rank_rise_while_it_works_and_return_to_zero(server):
    body = {
        "text": "What is 17 plus 25?",
        "sampling_params": {"max_new_tokens": 1900, "ignore_eos": True},
        "data_parallel_rank": 1,
        "stream": True,
    }
    seen = {name: 0.0 for name in IDLE_GAUGES if name != "sglang:num_queue_reqs"}
    with server.client.stream("POST", "/generate", json=body) as response:
        for number, _ in enumerate(events(response)):
            if number % 5 == 0:
                values = samples(server)
                seen = {name: max(old, values[name, "1"]) for name, old in seen.items()}
                assert all(values[name, "0"] == 0 for name in seen)
                if all(seen.values()):
                    break
    assert seen["sglang:num_running_reqs"] == 1
    assert all(seen.values())
    wait_until_idle(server)  # the client has left
    assert samples(server)["sglang:num_aborted_requests_total", None] >= 1


def test_a_request_is_found_by_its_id_in_the_logs_of_the_server_and_of_its_rank(server):
    """Also when its body brings an id of its own."""
    response = server.client.post(
        "/generate",
        json={"text": "What is 2 plus 2?", "rid": "mine", "data_parallel_rank": 1},
        headers={"x-request-id": "find me"},
    )
    assert response.headers["x-request-id"] == "find_me"
    expected = {
        ("server", "generation received"),
        ("rank 1", "generation arrived"),
        ("rank 1", "generation finished"),
        ("server", "generation finished"),
        ("server", "answered"),
    }
    deadline = time.monotonic() + 20
    messages: set[tuple[str, str]] = set()
    while messages < expected and time.monotonic() < deadline:
        time.sleep(0.05)
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if "find_me" in line]
        messages = {(line["process"], line["message"]) for line in lines}
    assert messages == expected
    assert all(line["request_id"] == "find_me" for line in lines)
    assert {line["generation"] for line in lines if line["message"].startswith("generation")} == {"mine"}


def test_every_line_of_the_log_is_json(server):
    lines = server.log.read_text().splitlines()
    assert len(lines) > 10
    assert all(json.loads(line)["message"] for line in lines)


def test_rows_that_are_not_quantized_before_they_travel_cost_more_bytes(tmp_path):
    flags = [*parallel_flags(2), "--enable-metrics", "--disable-flashinfer-cutlass-moe-fp4-allgather"]
    with launch(tmp_path / "log", *flags) as server:
        server.generate(text="What is 17 plus 25?")
        wait_until_idle(server)
        rows = by_rank(server, "nibble:rows_per_step_sum")
        assert by_rank(server, "nibble:dispatched_bytes_total") == [row * PLAIN_ROW * MOE_LAYERS for row in rows]
        assert samples(server)["nibble:fp4_allgather_enabled", None] == 0
