"""`nibble bench`: streams from a running server, and what they took."""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from tqdm import tqdm

from nibble.cli.sse_client import SseClient
from nibble.utils.errors import ConfigError

_PERCENTILES = (50, 95, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000", help="(default: %(default)s)")
    parser.add_argument("--api-key", help="key of the server")
    parser.add_argument("--num-prompts", type=int, default=256, help="requests in all (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="requests at once (default: %(default)s)")
    parser.add_argument(
        "--request-rate", type=float, help="new requests a second, at random times; default: as others end"
    )
    parser.add_argument("--input-len", type=int, default=64, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and arrival times (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


@dataclass
class _Measurement:
    started: float
    times: list[float] = field(default_factory=list)
    """When each event with new tokens came."""
    tokens: int = 0
    error: str | None = None

    def on_event(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        event = orjson.loads(data)
        if "error" in event:
            self.error = event["error"]["message"]
        elif event["meta_info"]["completion_tokens"] > self.tokens:
            self.tokens = event["meta_info"]["completion_tokens"]
            self.times.append(time.perf_counter())


def run(args: argparse.Namespace) -> int:
    """0, or 1 when a request failed."""
    for name in ("num_prompts", "concurrency", "input_len", "output_len"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.request_rate is not None and args.request_rate <= 0:
        raise ConfigError(f"--request-rate must be greater than 0, got {args.request_rate}")
    try:
        seconds, measurements = asyncio.run(_measure(args))
    except OSError as error:
        raise ConfigError(f"no server answers at {args.base_url}: {error}") from error
    figures = _figures(measurements, seconds)
    print(json.dumps(figures) if args.json else _table(figures))
    for message in sorted({measurement.error for measurement in measurements if measurement.error}):
        print(f"failed: {message}")
    return 1 if figures["failed"] else 0


async def _measure(args: argparse.Namespace) -> tuple[float, list[_Measurement]]:
    client = SseClient(args.base_url, args.api_key)
    info = await client.request("GET", "/model_info")
    if info.status != 200:
        raise ConfigError(f"{args.base_url}/model_info answers {info.status}: {info.error()}")
    vocab_size = orjson.loads(info.body)["vocab_size"]
    rng = random.Random(args.seed)
    prompts = [[rng.randrange(vocab_size) for _ in range(args.input_len)] for _ in range(args.num_prompts)]
    slots = asyncio.Semaphore(args.concurrency)
    sampling = {"temperature": 0, "max_new_tokens": args.output_len, "ignore_eos": True}

    with tqdm(total=args.num_prompts, unit="request", disable=args.json) as bar:

        async def ask(prompt: list[int]) -> _Measurement:
            async with slots:
                measurement = _Measurement(time.perf_counter())
                body = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
                try:
                    answer = await client.request("POST", "/generate", body, measurement.on_event)
                    if answer.status != 200:
                        measurement.error = answer.error()
                except OSError as error:
                    measurement.error = str(error)
                bar.update()
                return measurement

        started = time.perf_counter()
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(ask(prompt)))
            if args.request_rate is not None:
                await asyncio.sleep(rng.expovariate(args.request_rate))
        return time.perf_counter() - started, await asyncio.gather(*tasks)


def _figures(measurements: Sequence[_Measurement], seconds: float) -> dict[str, Any]:
    done = [measurement for measurement in measurements if measurement.error is None and measurement.times]
    end = max((measurement.times[-1] for measurement in done), default=0.0)
    seconds = max(seconds, end - min((measurement.started for measurement in done), default=0.0))
    gaps = [
        later - earlier
        for measurement in done
        for earlier, later in zip(measurement.times, measurement.times[1:], strict=False)
    ]
    return {
        "completed": len(done),
        "failed": len(measurements) - len(done),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(done) / seconds, 2),
        "output_tokens_per_second": round(sum(measurement.tokens for measurement in done) / seconds, 1),
        "time_to_first_token_ms": _percentiles([m.times[0] - m.started for m in done]),
        "between_events_ms": _percentiles(gaps),
        "latency_ms": _percentiles([m.times[-1] - m.started for m in done]),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds) or [0.0]
    ranks = {f"p{percent}": -(-len(ordered) * percent // 100) - 1 for percent in _PERCENTILES}
    return {name: round(1000 * ordered[rank], 2) for name, rank in ranks.items()}


def _table(figures: dict[str, Any]) -> str:
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict):
            value = "  ".join(f"{percentile} {number:g}" for percentile, number in value.items())
        lines.append(f"{name.replace('_', ' '):<26} {value}")
    return "\n".join(lines)
