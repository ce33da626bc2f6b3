"""What `/metrics` says. The HTTP process keeps all of it; the ranks report what only they know.

Metrics that mean the same as one of SGLang's or vLLM's have its name, or both names, so that dashboards made for
those work. What only this engine has begins with `nibble:`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from nibble.observability.generation_life import End, GenerationLife
from nibble.observability.histogram import Histogram, cumulative_buckets
from nibble.observability.rank_stats import ROW_BOUNDS, RankStats

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""The format that every scraper takes. prometheus_client's OpenMetrics would make `sglang_` of `sglang:`."""

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
_LAG_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})
_ENDS: tuple[End, ...] = ("stop", "length", "abort", "error")

Samples = Iterable[tuple[Sequence[str], float]]
"""Values by the values of their labels."""


class EngineMetrics(Collector):
    """A generation observer, and the registry of one engine. Everything happens in the event loop's thread."""

    def __init__(self, model_name: str, dp_size: int, fp4_allgather: bool) -> None:
        self._model = model_name
        self._fp4_allgather = fp4_allgather
        self._ranks = [RankStats(rank) for rank in range(dp_size)]
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._cached_tokens = 0
        self._ended: Counter[End] = Counter()
        self._responses: Counter[tuple[str, str, str]] = Counter()
        self._first_token = Histogram(_REQUEST_SECONDS)
        self._inter_token = Histogram(_TOKEN_SECONDS)
        self._per_output_token = Histogram(_TOKEN_SECONDS)
        self._latency = Histogram(_REQUEST_SECONDS)
        self._queue = Histogram(_REQUEST_SECONDS)
        self._loop_lag = Histogram(_LAG_SECONDS)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format, `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    # What is observed

    def on_start(self, life: GenerationLife) -> None:
        """Counted when it gets somewhere."""

    def on_tokens(self, life: GenerationLife, num_tokens: int, seconds: float) -> None:
        self._generation_tokens += num_tokens
        if life.first_token_at is not None:
            self._inter_token.observe(seconds / num_tokens, num_tokens)
            return
        assert life.output is not None
        self._prompt_tokens += life.output.prompt_tokens
        self._cached_tokens += life.output.cached_tokens
        self._first_token.observe(seconds)

    def on_end(self, life: GenerationLife) -> None:
        assert life.ended is not None and life.ended_at is not None
        if life.ended == "refused":
            return
        self._ended[life.ended] += 1
        if life.ended in ("stop", "length"):
            self._latency.observe(life.ended_at - life.received_at)
            if life.first_token_at is not None and life.num_tokens > 1:
                self._per_output_token.observe((life.news_at - life.first_token_at) / (life.num_tokens - 1))

    def on_response(self, endpoint: str | None, method: str, status: int) -> None:
        """One HTTP request was answered; `endpoint` is the route that did, if one matched."""
        self._responses[endpoint or "unmatched", method if method in _METHODS else "other", str(status)] += 1

    def on_loop_lag(self, seconds: float) -> None:
        """How late the event loop was, once in a while."""
        self._loop_lag.observe(seconds)

    def on_rank_stats(self, stats: RankStats) -> None:
        """The newest report of one rank."""
        self._ranks[stats.rank] = stats
        for seconds in stats.queue_seconds:
            self._queue.observe(seconds)

    # What is told

    def collect(self) -> Iterator[Metric]:
        yield from self._collect_requests()
        yield from self._collect_ranks()
        yield from self._collect_dispatch()

    def _collect_requests(self) -> Iterator[Metric]:
        yield from self._counters(
            ("sglang:prompt_tokens", "vllm:prompt_tokens"),
            "Prompt tokens of generations that have their first token.",
            self._prompt_tokens,
        )
        yield from self._counters(
            ("sglang:generation_tokens", "vllm:generation_tokens"), "Generated tokens.", self._generation_tokens
        )
        yield from self._counters(
            ("sglang:cached_tokens",), "Prompt tokens whose keys and values were cached.", self._cached_tokens
        )
        hit_rate = self._cached_tokens / self._prompt_tokens if self._prompt_tokens else 0.0
        yield self._gauge(
            "sglang:cache_hit_rate", "Cached part of all prompt tokens since the start, 0 to 1.", hit_rate
        )
        yield from self._counters(
            ("sglang:num_requests",), "Generations that ended, in whatever way.", sum(self._ended.values())
        )
        yield from self._counters(
            ("sglang:num_aborted_requests",),
            "Generations that a client aborted, or left by disconnecting.",
            self._ended["abort"],
        )
        for name in ("nibble:finished_requests", "vllm:request_success"):
            yield _counter(
                name,
                "Generations by how they ended: stop, length, abort or error.",
                ("model_name", "finished_reason"),
                (((self._model, end), self._ended[end]) for end in _ENDS),
            )
        yield _counter(
            "sglang:http_responses",
            "HTTP responses by route, method and status.",
            ("endpoint", "method", "status_code"),
            self._responses.items(),
        )
        yield from self._histograms(
            ("sglang:time_to_first_token_seconds", "vllm:time_to_first_token_seconds"),
            "From the arrival of the HTTP request to the first token.",
            self._first_token,
        )
        yield from self._histograms(
            ("sglang:inter_token_latency_seconds", "vllm:inter_token_latency_seconds"),
            "Between two tokens of a generation; tokens that come together share their time equally.",
            self._inter_token,
        )
        yield from self._histograms(
            ("vllm:request_time_per_output_token_seconds",),
            "Mean time per token of a generation, after its first.",
            self._per_output_token,
        )
        yield from self._histograms(
            ("sglang:e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds"),
            "From the arrival of the HTTP request to the end of a generation that stopped or reached its length.",
            self._latency,
        )
        yield from self._histograms(
            ("sglang:queue_time_seconds", "vllm:request_queue_time_seconds"),
            "From a generation's arrival at its rank to its first step there.",
            self._queue,
        )
        yield from self._histograms(
            ("nibble:event_loop_lag_seconds",),
            "How late the event loop of the HTTP process was, 50 times a second.",
            self._loop_lag,
        )

    def _collect_ranks(self) -> Iterator[Metric]:
        gauges: list[tuple[tuple[str, ...], str, Callable[[RankStats], float]]] = [
            (
                ("sglang:num_running_reqs", "vllm:num_requests_running"),
                "Generations that run on a rank.",
                lambda rank: rank.num_running,
            ),
            (
                ("sglang:num_queue_reqs", "vllm:num_requests_waiting"),
                "Generations that wait on a rank.",
                lambda rank: rank.num_queued,
            ),
            (
                ("sglang:num_used_tokens",),
                "Tokens of the KV pages that running generations hold.",
                lambda rank: rank.num_used_tokens,
            ),
            (("sglang:max_total_num_tokens",), "Tokens that the KV cache holds.", lambda rank: rank.num_total_tokens),
            (
                ("sglang:token_usage", "vllm:kv_cache_usage_perc"),
                "Used part of the KV cache, 0 to 1.",
                lambda rank: rank.num_used_tokens / rank.num_total_tokens if rank.num_total_tokens else 0.0,
            ),
            (
                ("sglang:gen_throughput",),
                "Tokens generated per second, over the last report's time.",
                lambda rank: rank.gen_throughput,
            ),
            (
                ("sglang:num_retracted_reqs",),
                "Times since the start that a generation had to give its KV pages back and begin again.",
                lambda rank: rank.num_retracted,
            ),
        ]
        for names, help_text, value in gauges:
            for name in names:
                family = GaugeMetricFamily(name, help_text, labels=("model_name", "dp_rank"))
                for labels, number in self._by_rank(value):
                    family.add_metric(labels, number)
                yield family
        yield self._rank_counter(
            "vllm:num_preemptions", "As sglang:num_retracted_reqs, as a counter.", lambda rank: rank.num_retracted
        )

    def _collect_dispatch(self) -> Iterator[Metric]:
        rows = HistogramMetricFamily(
            "nibble:rows_per_step",
            "Rows (tokens) that a rank brought to a step of all ranks; 0 while only others had work.",
            labels=("model_name", "dp_rank"),
        )
        for rank in self._ranks:
            rows.add_metric(
                self._rank_labels(rank), cumulative_buckets(ROW_BOUNDS, rank.steps_by_rows), sum_value=rank.num_rows
            )
        yield rows
        yield self._rank_counter(
            "nibble:dispatched_bytes",
            "Bytes of rows sent to the other ranks' experts: rows * bytes of a row * peers * MoE layers.",
            lambda rank: rank.dispatched_bytes,
        )
        yield self._rank_counter(
            "nibble:combined_bytes",
            "Bytes of partial sums sent back to the ranks whose rows they are: their rows * bytes of a"
            " row * MoE layers.",
            lambda rank: rank.combined_bytes,
        )
        yield self._rank_counter(
            "nibble:dp_sync_seconds",
            "Time in the exchange of row counts before each step: mostly waiting for the slowest rank.",
            lambda rank: rank.dp_sync_seconds,
        )
        yield self._gauge(
            "nibble:fp4_allgather_enabled", "1 when rows travel as NVFP4, 0 when unquantized.", self._fp4_allgather
        )

    def _counters(self, names: Sequence[str], help_text: str, value: float) -> Iterator[Metric]:
        for name in names:
            yield _counter(name, help_text, ("model_name",), [((self._model,), value)])

    def _histograms(self, names: Sequence[str], help_text: str, histogram: Histogram) -> Iterator[Metric]:
        for name in names:
            family = HistogramMetricFamily(name, help_text, labels=("model_name",))
            family.add_metric((self._model,), histogram.buckets(), sum_value=histogram.sum)
            yield family

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help_text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _rank_counter(self, name: str, help_text: str, value: Callable[[RankStats], float]) -> Metric:
        return _counter(name, help_text, ("model_name", "dp_rank"), self._by_rank(value))

    def _by_rank(self, value: Callable[[RankStats], float]) -> Samples:
        return [(self._rank_labels(rank), value(rank)) for rank in self._ranks]

    def _rank_labels(self, rank: RankStats) -> tuple[str, str]:
        return self._model, str(rank.rank)


def _counter(name: str, help_text: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for values, number in samples:
        family.add_metric(values, number)
    return family
