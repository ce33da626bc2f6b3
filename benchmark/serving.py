"""The server under load, over HTTP.

    python benchmark/serving.py sweep --rates 2 8 32
    python benchmark/serving.py multi-turn
    python benchmark/serving.py burst --ranks 4

sweep: requests at random times at each rate; throughput, time to first token, time between tokens, and how many
requests run on each rank. multi-turn: conversations that all begin with one system prompt, with the prefix cache and
without; how many prompt tokens are computed. burst: requests of very different lengths at once; outstanding tokens of
the fullest rank, to the mean. Each starts the servers that it measures; flags after -- are theirs. Prints a table and
one JSON line.
"""

import argparse
import asyncio
import json
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

STARTUP_SECONDS = 600
SAMPLE_SECONDS = 0.25
MAX_CONNECTIONS = 4096


@asynccontextmanager
async def server(args: argparse.Namespace, *flags: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that is ready, and gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = str(args.ranks)
    command = [sys.executable, "-m", "nibble.launch_server", "--model-path", args.model_path, "--port", str(port)]
    command += ["--tp", size, "--dp", size, "--ep", size, "--enable-metrics", "--log-level", "warning"]
    command += ["--enable-dp-attention", "--enable-flashinfer-cutlass-moe"] if args.ranks > 1 else []
    process = subprocess.Popen([*command, *flags, *args.server_flags])
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as client:
            deadline = time.monotonic() + STARTUP_SECONDS
            while not await is_ready(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server did not start")
                await asyncio.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait()


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ready")).status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Timing:
    """Of one request, in seconds."""

    first_token: float = 0.0
    between_tokens: list[float] = field(default_factory=list)
    tokens: int = 0


async def stream(client: httpx.AsyncClient, input_ids: list[int], new_tokens: int) -> Timing:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": input_ids, "sampling_params": sampling, "stream": True}
    timing, last = Timing(), time.perf_counter()
    async with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now, count = time.perf_counter(), json.loads(line[6:])["meta_info"]["completion_tokens"]
            if timing.tokens == 0:
                timing.first_token = now - last
            elif count > timing.tokens:  # tokens that come together share their time
                timing.between_tokens += [(now - last) / (count - timing.tokens)] * (count - timing.tokens)
            timing.tokens, last = count, now
    return timing


class Occupancy:
    """How many requests run on each rank, looked up now and then."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.running: dict[str, list[float]] = {}

    async def watch(self) -> None:
        while True:
            text = (await self.client.get("/metrics")).text
            for rank, value in re.findall(
                r'^sglang:num_running_reqs\{.*dp_rank="(\d+)".*\} (\S+)$', text, re.MULTILINE
            ):
                self.running.setdefault(rank, []).append(float(value))
            await asyncio.sleep(SAMPLE_SECONDS)

    def means(self) -> list[float]:
        return [round(statistics.mean(self.running[rank]), 1) for rank in sorted(self.running, key=int)]


def random_prompt(generator: random.Random, vocab_size: int, median: float) -> list[int]:
    length = min(1200, max(1, int(generator.lognormvariate(0, 0.8) * median)))
    return [generator.randrange(3, vocab_size) for _ in range(length)]


def percentiles(values: Sequence[float]) -> list[float]:
    """50th and 99th, in milliseconds."""
    if len(values) < 2:
        return [round(value * 1000, 1) for value in values] * 2
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [round(cuts[49] * 1000, 1), round(cuts[98] * 1000, 1)]


async def vocabulary(client: httpx.AsyncClient) -> int:
    size: int = (await client.get("/model_info")).json()["vocab_size"]
    return size


async def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"{'req/s':>6} {'tok/s':>8} {'TTFT p50':>9} {'p99':>8} {'ITL p50':>8} {'p99':>8} (ms)  running on each rank")
    results = []
    async with server(args) as client:
        vocab_size = await vocabulary(client)
        await stream(client, [5] * 8, 8)
        for rate in args.rates:
            result = await run_at(client, rate, args, vocab_size)
            results.append(result)
            print(
                f"{rate:>6g} {result['tokens_per_second']:>8.0f} {result['ttft_ms'][0]:>9} {result['ttft_ms'][1]:>8} "
                f"{result['itl_ms'][0]:>8} {result['itl_ms'][1]:>8}       {result['running_per_rank']}",
                flush=True,
            )
    return results


async def run_at(client: httpx.AsyncClient, rate: float, args: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    generator = random.Random(args.seed)
    occupancy = Occupancy(client)
    watching = asyncio.create_task(occupancy.watch())
    began = time.perf_counter()
    requests = []
    for _ in range(max(10, int(rate * args.seconds))):
        prompt = random_prompt(generator, vocab_size, args.prompt_tokens)
        new_tokens = max(2, int(generator.lognormvariate(0, 0.6) * args.new_tokens))
        requests.append(asyncio.create_task(stream(client, prompt, new_tokens)))
        await asyncio.sleep(generator.expovariate(rate))
    timings = await asyncio.gather(*requests)
    elapsed = time.perf_counter() - began
    watching.cancel()
    return {
        "rate": rate,
        "tokens_per_second": sum(timing.tokens for timing in timings) / elapsed,
        "ttft_ms": percentiles([timing.first_token for timing in timings]),
        "itl_ms": percentiles([gap for timing in timings for gap in timing.between_tokens]),
        "running_per_rank": occupancy.means(),
    }


async def multi_turn(args: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"{'':>14} {'prompt tokens':>14} {'computed':>9} {'seconds':>8}")
    results: list[dict[str, Any]] = []
    for name, flags in (("prefix cache", ()), ("without", ("--disable-radix-cache",))):
        async with server(args, *flags) as client:
            vocab_size = await vocabulary(client)
            began = time.perf_counter()
            turns = await asyncio.gather(*(converse(client, number, args, vocab_size) for number in range(args.users)))
            prompt = sum(tokens for turn in turns for tokens, _ in turn)
            computed = prompt - sum(cached for turn in turns for _, cached in turn)
            result = {"name": name, "prompt_tokens": prompt, "computed": computed, "s": time.perf_counter() - began}
            results.append(result)
            print(f"{name:>14} {prompt:>14} {computed:>9} {result['s']:>8.1f}", flush=True)
    print(f"{results[1]['computed'] / results[0]['computed']:.1f} times less to prefill")
    return results


async def converse(
    client: httpx.AsyncClient, number: int, args: argparse.Namespace, vocab_size: int
) -> list[tuple[int, int]]:
    """Tokens of the prompt, and how many were cached, in each turn of a conversation."""
    system = [random.Random(0).randrange(3, vocab_size) for _ in range(args.system_tokens)]
    generator = random.Random(number + 1)
    conversation, turns = list(system), []
    for _ in range(args.turns):
        conversation += random_prompt(generator, vocab_size, args.prompt_tokens / 4)
        sampling = {"temperature": 0, "max_new_tokens": args.new_tokens, "ignore_eos": True}
        response = await client.post("/generate", json={"input_ids": conversation, "sampling_params": sampling})
        answer = response.raise_for_status().json()
        turns.append((answer["meta_info"]["prompt_tokens"], answer["meta_info"]["cached_tokens"]))
        conversation += answer["output_ids"]
    return turns


async def burst(args: argparse.Namespace) -> list[dict[str, Any]]:
    print(f"{'method':>15} {'outstanding tokens of each rank':<40} {'fullest to mean':>16} {'seconds':>8}")
    results = []
    for method in ("total_tokens", "total_requests", "round_robin"):
        async with server(args, "--load-balance-method", method) as client:
            generator, vocab_size = random.Random(args.seed), await vocabulary(client)
            began = time.perf_counter()
            prompts = [random_prompt(generator, vocab_size, args.prompt_tokens) for _ in range(args.requests)]
            lengths = [max(1, int(generator.lognormvariate(0, 0.6) * args.new_tokens)) for _ in prompts]
            params = [{"temperature": 0, "max_new_tokens": length, "ignore_eos": True} for length in lengths]
            body = {"input_ids": prompts, "sampling_params": params}  # one request, so that all come at once
            answer = asyncio.create_task(client.post("/generate", json=body))
            outstanding = await fullest_moment(client, answer)
            (await answer).raise_for_status()
            ratio = max(outstanding) * len(outstanding) / sum(outstanding)
            elapsed = time.perf_counter() - began
            results.append({"method": method, "outstanding": outstanding, "ratio": ratio, "s": elapsed})
            print(f"{method:>15} {outstanding!s:<40} {ratio:>16.3f} {elapsed:>8.1f}", flush=True)
    return results


async def fullest_moment(client: httpx.AsyncClient, answer: "asyncio.Task[httpx.Response]") -> list[int]:
    """Outstanding tokens of each rank when there were most in all: when the whole burst had come."""
    fullest: list[int] = []
    while not answer.done():
        now: list[int] = (await client.get("/server_info")).json()["outstanding_tokens_per_rank"]
        fullest = max(fullest, now, key=sum)
        await asyncio.sleep(0.02)
    return fullest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=("sweep", "multi-turn", "burst"))
    parser.add_argument("--model-path", default="assets/nibble-demo-6m-nvfp4")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--prompt-tokens", type=int, default=100, help="median of a prompt; multi-turn: four turns' part"
    )
    parser.add_argument("--new-tokens", type=int, default=60, help="median of an answer")
    parser.add_argument("--rates", type=float, nargs="+", default=[2, 8, 32], help="sweep: requests per second")
    parser.add_argument("--seconds", type=float, default=10, help="sweep: how long requests come at each rate")
    parser.add_argument("--users", type=int, default=32, help="multi-turn: conversations at once")
    parser.add_argument("--turns", type=int, default=5, help="multi-turn: of each conversation")
    parser.add_argument("--system-tokens", type=int, default=200, help="multi-turn: what all begin with")
    parser.add_argument("--requests", type=int, default=512, help="burst: how many")
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    args.server_flags = argv[split + 1 :]
    workload = {"sweep": sweep, "multi-turn": multi_turn, "burst": burst}[args.workload]
    results = asyncio.run(workload(args))
    print(json.dumps({"benchmark": f"serving {args.workload}", "machine": platform.machine(), "results": results}))


if __name__ == "__main__":
    main()
