"""What /metrics says about what was asked, over an engine without a model and a rank without a model."""

import asyncio
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fake_engine import BODIES, CHAT, COMPLETIONS, Api, FakeEngine, conversation
from nibble.ipc.messages import AbortRequest
from nibble.observability.histogram import Histogram
from nibble.observability.metrics import EngineMetrics
from nibble.observability.rank_stats import NUM_ROW_BUCKETS, ROW_BOUNDS, RankStats, row_bucket
from nibble.scheduler.dp_sync import DpSyncResult
from nibble.scheduler.rank_statistics import MoeTraffic, RankStatistics
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import ScheduledRequest
from nibble.utils.errors import EngineDeadError
from test_event_loop import Rank, new_request, says

DOCS = Path(__file__).parents[2] / "docs"
ROUTES = pytest.mark.parametrize("path", BODIES)
BOTH = [
    ("sglang:prompt_tokens_total", "vllm:prompt_tokens_total"),
    ("sglang:generation_tokens_total", "vllm:generation_tokens_total"),
    ("sglang:time_to_first_token_seconds_count", "vllm:time_to_first_token_seconds_count"),
    ("sglang:inter_token_latency_seconds_count", "vllm:inter_token_latency_seconds_count"),
    ("sglang:e2e_request_latency_seconds_count", "vllm:e2e_request_latency_seconds_count"),
    ("sglang:queue_time_seconds_count", "vllm:request_queue_time_seconds_count"),
    ("sglang:num_running_reqs", "vllm:num_requests_running"),
    ("sglang:num_queue_reqs", "vllm:num_requests_waiting"),
    ("sglang:token_usage", "vllm:kv_cache_usage_perc"),
    ("sglang:num_retracted_reqs", "vllm:num_preemptions_total"),
]
STATS = RankStats(
    1,
    num_running=3,
    num_queued=4,
    num_used_tokens=32,
    num_total_tokens=128,
    gen_throughput=12.5,
    num_retracted=2,
    num_rows=9,
    steps_by_rows=(1, 1, 0, 0, 1, *[0] * (NUM_ROW_BUCKETS - 5)),
    dispatched_bytes=900,
    combined_bytes=90,
    dp_sync_seconds=0.5,
    queue_seconds=(0.25, 0.5),
)


class Metered:
    """An app that keeps metrics."""

    def __init__(self, engine: FakeEngine | None = None, **options: Any) -> None:
        self.metrics = EngineMetrics("tiny/model", dp_size=2, fp4_allgather=True)
        self.api = Api(engine, metrics=self.metrics, **options)
        self.engine = self.api.engine

    def families(self) -> dict[str, prometheus_client.Metric]:
        response = self.api.get("/metrics")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/plain")
        return {family.name: family for family in text_string_to_metric_families(response.text)}

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        """The values of one name by those of its labels other than model_name, in the labels' order."""
        return {
            tuple(value for label, value in sorted(sample.labels.items()) if label != "model_name"): sample.value
            for family in self.families().values()
            for sample in family.samples
            if sample.name == name
        }

    def value(self, name: str) -> float:
        """The sum over all labels."""
        return sum(self.samples(name).values())

    def ends(self) -> dict[str, float]:
        return {reason: count for (reason,), count in self.samples("nibble:finished_requests_total").items() if count}


def test_without_metrics_there_is_no_such_page():
    assert Api().get("/metrics").status_code == 404
    assert "/metrics" not in Api().get("/openapi.json").json()["paths"]
    assert "/metrics" in Metered().api.get("/openapi.json").json()["paths"]


@ROUTES
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_times_add_up_with_what_was_asked_and_answered(path, stream):
    metered = Metered()
    several = {COMPLETIONS: {"prompt": ["Hi", "Hello there"], "n": 2}, CHAT: {"n": 3}}
    several["/generate"] = {"text": ["Hi", "Hello there"]}
    for body in (BODIES[path], several[path]):
        response = metered.api.post(path, {**BODIES[path], **body, "stream": stream})
        assert response.status_code == 200, response.text
    asked = metered.engine.requests
    reply = len(metered.engine.tokenizer.encode("Hello, 世界 😀! <div>it's 1234 o'clock</div>")) + 1
    generated = sum(min(reply, request.sampling.max_new_tokens) for request in asked)
    assert metered.value("sglang:num_requests_total") == len(asked)
    assert metered.value("sglang:prompt_tokens_total") == sum(len(request.input_ids) for request in asked)
    assert metered.value("sglang:generation_tokens_total") == generated
    assert metered.value("sglang:cached_tokens_total") == 3 * len(asked), "the engine says 3 of each"
    assert metered.value("sglang:cache_hit_rate") == 3 * len(asked) / metered.value("sglang:prompt_tokens_total")
    assert metered.value("sglang:time_to_first_token_seconds_count") == len(asked)
    assert metered.value("sglang:inter_token_latency_seconds_count") == generated - len(asked)
    assert metered.value("sglang:e2e_request_latency_seconds_count") == len(asked)
    assert metered.value("vllm:request_time_per_output_token_seconds_count") == len(asked)


def test_the_times_of_a_generation_fit_together():
    metered = Metered()
    for _ in range(3):
        metered.api.result("/generate", {"text": "Hi"})
    names = ("time_to_first_token", "inter_token_latency", "e2e_request_latency")
    first, between, whole = (metered.value(f"sglang:{name}_seconds_sum") for name in names)
    assert first > 0 and between > 0
    assert whole >= first + between


def test_ends_are_counted_by_their_reason():
    metered = Metered()
    metered.api.result("/generate", {"text": "Hi"})
    metered.api.result("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 2}})
    metered.engine.fail_after = 1
    metered.api.error("/generate", {"text": "Hi"}, 500)
    metered.engine.failure = EngineDeadError("a rank died")
    metered.api.error("/generate", {"text": "Hi"}, 503)
    assert metered.ends() == {"stop": 1, "length": 1, "error": 2}
    assert metered.value("sglang:num_requests_total") == 4
    assert metered.value("sglang:e2e_request_latency_seconds_count") == 2, "failures are no measure of speed"


def test_what_the_engine_never_took_is_an_http_response_and_no_generation():
    metered = Metered()
    metered.api.error("/generate", {"text": ""})
    metered.engine.current_state = "draining"
    metered.api.error("/generate", {"text": "Hi"}, 503)
    assert metered.value("sglang:num_requests_total") == 0
    assert metered.samples("sglang:http_responses_total") == {
        ("/generate", "POST", "400"): 1,
        ("/generate", "POST", "503"): 1,
        ("/metrics", "GET", "200"): 1,
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_and_a_client_that_leaves_count_as_aborted(stream):
    metered = Metered()
    metered.engine.hang_after = 2
    body = {"text": "Hi", "rid": "mine", "stream": stream}

    async def begin(leave: asyncio.Event) -> asyncio.Task[None]:
        asking = asyncio.create_task(conversation(metered.api, "/generate", body, [], leave))
        for _ in range(20):
            await asyncio.sleep(0.001)
        return asking

    async def ask_and_abort() -> None:
        asking = await begin(asyncio.Event())
        async with metered.api.http_client() as client:
            await client.post("/abort_request", json={"rid": "mine"})
        await asking

    async def ask_and_leave() -> None:
        leave = asyncio.Event()
        asking = await begin(leave)
        leave.set()
        await asking

    metered.api.run(ask_and_abort())
    assert metered.ends() == {"abort": 1}
    metered.api.run(ask_and_leave())
    assert metered.ends() == {"abort": 2}
    assert metered.value("sglang:num_aborted_requests_total") == 2


def test_clients_cannot_make_new_series_by_what_they_send():
    metered = Metered(api_key="secret")
    key = {"authorization": "Bearer secret"}
    for path in ("/a", "/b"):
        metered.api.get(path, headers=key)
        metered.api.get(path)
    metered.api.request("BREW", "/health")
    labels = {
        (sample.labels["endpoint"], sample.labels["method"], sample.labels["status_code"])
        for family in text_string_to_metric_families(metered.metrics.exposition().decode())
        for sample in family.samples
        if family.name == "sglang:http_responses"
    }
    assert labels == {("unmatched", "GET", "404"), ("unmatched", "GET", "401"), ("/health", "other", "405")}


def test_metrics_need_the_api_key():
    metered = Metered(api_key="secret")
    assert metered.api.get("/metrics").status_code == 401
    assert metered.api.get("/metrics", headers={"authorization": "Bearer secret"}).status_code == 200


def test_what_a_rank_reports_is_told_under_its_number():
    metered = Metered()
    metered.metrics.on_rank_stats(STATS)
    expected = {
        "sglang:num_running_reqs": 3,
        "sglang:num_queue_reqs": 4,
        "sglang:num_used_tokens": 32,
        "sglang:max_total_num_tokens": 128,
        "sglang:token_usage": 0.25,
        "sglang:gen_throughput": 12.5,
        "sglang:num_retracted_reqs": 2,
        "nibble:rows_per_step_sum": 9,
        "nibble:rows_per_step_count": 3,
        "nibble:dispatched_bytes_total": 900,
        "nibble:combined_bytes_total": 90,
        "nibble:dp_sync_seconds_total": 0.5,
    }
    assert {name: metered.samples(name) for name in expected} == {
        name: {("0",): 0, ("1",): value} for name, value in expected.items()
    }
    assert metered.value("sglang:queue_time_seconds_count") == 2
    assert metered.value("sglang:queue_time_seconds_sum") == 0.75
    assert metered.value("nibble:fp4_allgather_enabled") == 1


@pytest.mark.parametrize(("sglang", "vllm"), BOTH)
def test_both_names_of_a_metric_have_the_same_values(sglang, vllm):
    metered = Metered()
    metered.metrics.on_rank_stats(STATS)
    metered.api.result("/generate", {"text": "Hi"})
    assert metered.value(sglang) > 0
    assert metered.samples(sglang) == metered.samples(vllm)


def test_scrapers_that_would_take_openmetrics_get_the_names_that_dashboards_know():
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3"
    response = Metered().api.get("/metrics", headers={"accept": accept})
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "sglang:prompt_tokens_total{" in response.text


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5))))
def test_the_histogram_is_that_of_prometheus_client(observations):
    bounds = (0.1, 1.0, 10.0)
    mine = Histogram(bounds)
    theirs = prometheus_client.Histogram("h", "help", buckets=bounds, registry=None)
    for value, times in observations:
        mine.observe(value, times)
        for _ in range(times):
            theirs.observe(value)
    (family,) = theirs.collect()
    expected = {sample.labels.get("le", sample.name): sample.value for sample in family.samples}
    assert dict(mine.buckets()) == {bound: expected[bound] for bound in ("0.1", "1.0", "10.0", "+Inf")}
    assert mine.sum == pytest.approx(expected["h_sum"])


@given(st.integers(0, 100_000))
def test_rows_are_counted_in_the_first_bucket_that_has_room_for_them(rows):
    bounds = [*ROW_BOUNDS, float("inf")]
    assert len(bounds) == NUM_ROW_BUCKETS
    assert row_bucket(rows) == next(index for index, bound in enumerate(bounds) if rows <= bound)


# A rank


class Clock:
    """Each look at it takes so long."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def reports_of(rank: Rank, clock: Clock) -> list[RankStats]:
    """What a rank that runs until it sleeps for good reports. A row costs 10 bytes to dispatch and 3 to combine."""
    reports: list[RankStats] = []
    rank.loop.statistics = RankStatistics(0, MoeTraffic(10, 3), reports.append, clock)
    rank.run()
    return reports


def test_a_busy_rank_reports_once_a_second_and_once_more_before_it_sleeps():
    rank = Rank([[new_request(1, max_new_tokens=40)]])
    reports = reports_of(rank, Clock(0.1))
    assert len(rank.sizes) == 40
    assert 3 <= len(reports) <= 6
    assert [report.num_running for report in reports[:-2]] == [1] * (len(reports) - 2), "the last two may be of its end"
    assert reports[-1].num_running == 0
    assert all(8 < report.gen_throughput < 12 for report in reports[1:-2]), "ten steps a second, a token each"


def test_the_last_report_is_that_of_a_rank_at_rest_and_counts_all_its_steps():
    rank = Rank([[new_request(1, prompt=20)]], peer=[says(5, sequence=0), says(1)])
    last = reports_of(rank, Clock(1e-6))[-1]
    mine, theirs = zip(*rank.sizes, strict=True)
    assert (last.num_running, last.num_queued, last.num_used_tokens, last.gen_throughput) == (0, 0, 0, 0)
    assert last.num_total_tokens == 32 * 4
    assert last.num_rows == sum(mine)
    assert {index: n for index, n in enumerate(last.steps_by_rows) if n} == Counter(map(row_bucket, mine))
    assert last.dispatched_bytes == sum(mine) * 10, "to one peer"
    assert last.combined_bytes == sum(theirs) * 3
    assert last.dp_sync_seconds > 0


def test_a_group_that_never_meets_the_others_counts_its_own_rows_whatever_its_number():
    reports: list[RankStats] = []
    statistics = RankStatistics(3, MoeTraffic(10, 3), reports.append, Clock(10))
    step = [ScheduledRequest(Request(new_request(1)), 0, 3, samples=True)]
    statistics.count_step(step, DpSyncResult((3,), (1,), decodes_only=False, may_sleep=False), 0.0)
    statistics.report(Rank([]).loop.scheduler, sleeps=False)
    assert [(report.rank, report.num_rows, report.dispatched_bytes) for report in reports] == [(3, 3, 0)]


def test_a_rank_that_sleeps_reports_nothing():
    assert reports_of(Rank([]), Clock(10)) == []
    assert reports_of(Rank([[AbortRequest("unknown")]]), Clock(10)) == []


def test_each_request_waits_once_and_an_aborted_one_not_at_all():
    first, second = new_request(1, prompt=8), new_request(2, prompt=8)
    rank = Rank([[first, second, AbortRequest("r2")], [], [new_request(3, prompt=8)]])
    waits = [seconds for report in reports_of(rank, Clock(0.01)) for seconds in report.queue_seconds]
    assert len(waits) == 2
    assert all(seconds > 0 for seconds in waits)


def test_the_first_token_is_told_at_once_however_rarely_the_others_are():
    rank = Rank([[new_request(1, max_new_tokens=6)]])
    rank.inbox[0][0] = type(message := rank.inbox[0][0])(
        **{name: getattr(message, name) for name in message.__struct_fields__} | {"update_interval": 64}
    )
    rank.run()
    assert [len(batch.updates[0].token_ids) for batch in rank.updates] == [1, 5]


# What is written about metrics


def exposed() -> dict[str, set[str]]:
    """Every metric by the name that its page uses, with its labels."""
    metered = Metered()
    metered.api.get("/health")
    names = {
        family.name + ("_total" if family.type == "counter" else ""): family for family in metered.families().values()
    }
    return {name: {label for s in family.samples for label in s.labels} - {"le"} for name, family in names.items()}


def test_the_page_about_metrics_lists_each_with_its_labels_and_no_other():
    documented = {}
    for line in (DOCS / "metrics.md").read_text().splitlines():
        cells = line.split("|")
        for name in re.findall(r"`(\w+:\w+)`", cells[1]) if len(cells) == 5 else []:
            documented[name] = set(re.findall(r"`(\w+)`", cells[2]))
    assert documented == exposed()


def test_the_dashboard_asks_only_for_metrics_and_labels_that_exist():
    dashboard = json.loads((DOCS / "grafana" / "nibble.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 20
    variables = [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["name"] == "model_name"
    ]
    metrics = exposed()
    for expression in [*expressions, *variables]:
        asked = defaultdict(set)
        for name, selector in re.findall(r"(\w+:\w+)(?:\{(.*?)\})?", expression):
            asked[re.sub(r"_(bucket|sum|count)$", "", name)] |= set(re.findall(r"(\w+)=", selector))
        grouped = set(re.findall(r"by \((\w+)\)", expression)) - {"le"}
        assert asked, expression
        for name, labels in asked.items():
            assert labels | grouped <= metrics[name], expression


def test_panels_of_the_dashboard_have_ids_and_places_of_their_own():
    panels = json.loads((DOCS / "grafana" / "nibble.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(cells.values()) == 1 and max(x for x, _ in cells) < 24
