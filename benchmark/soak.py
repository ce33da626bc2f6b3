"""Many streams at once for a while, a part of them left by their clients, and what is left of them afterwards.

    python benchmark/soak.py --streams 1000 --seconds 300

Starts a server on --ranks ranks. Each of --streams clients asks again and again, /generate and /v1/completions in
turn, for answers of random lengths, and leaves one in --leave of them before its end. Every answer that it reads to
the end must be complete. At the end the server must be as it was: no request, no KV page and no connection held, its
memory no more than --growth larger than after the first fifth of the time. Prints the figures and one line of JSON;
exits with 1 if anything failed.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import orjson
import psutil

from nibble.cli.sse_client import SseClient

STARTUP_SECONDS = 120
MAX_LAG_SECONDS = 0.05
"""The 99th percentile of the event loop's lag must be below."""
LENGTHS = (10, 300)
"""Tokens of an answer."""


@dataclass
class Outcome:
    answers: Counter[str] = field(default_factory=Counter)
    """Complete, left, or what went wrong."""
    tokens: int = 0


class Left(Exception):
    """This client goes away."""


async def one_answer(client: SseClient, rng: random.Random, leave: float, outcome: Outcome) -> None:
    length = rng.randint(*LENGTHS)
    prompt = [rng.randrange(3, 800) for _ in range(rng.randint(1, 40))]
    is_native = rng.random() < 0.5
    if is_native:
        sampling = {"max_new_tokens": length, "ignore_eos": True, "temperature": rng.choice([0, 1])}
        path, body = "/generate", {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    else:
        fields = {"max_tokens": length, "ignore_eos": True, "stream": True}
        path, body = "/v1/completions", {"prompt": prompt, "stream_options": {"include_usage": True}, **fields}
    leaves_after = rng.randint(0, 20) if rng.random() < leave else None
    events: list[bytes] = []
    left = asyncio.get_running_loop().create_future()

    def on_event(data: bytes) -> None:
        events[:] = [*events[-1:], data]
        nonlocal leaves_after
        if leaves_after is not None:
            leaves_after -= 1
            if leaves_after < 0 and not left.done():
                left.set_result(None)

    asking = asyncio.ensure_future(client.request("POST", path, body, on_event))
    await asyncio.wait({asking, left}, return_when=asyncio.FIRST_COMPLETED)
    if left.done() and not asking.done():
        asking.cancel()
        await asyncio.wait({asking})
        outcome.answers["left"] += 1
        return
    answer = asking.result()
    if answer.status != 200:
        outcome.answers[f"{answer.status}: {answer.error()}"] += 1
        return
    last = orjson.loads(events[0]) if len(events) == 2 and events[1] == b"[DONE]" else {}
    counts = last.get("meta_info", {}) if is_native else last.get("usage") or {}
    is_complete = counts.get("completion_tokens") == length
    outcome.tokens += length
    outcome.answers["complete" if is_complete else f"incomplete: {events[0][:200]!r}"] += 1


async def soak(url: str, streams: int, seconds: float, leave: float, pid: int) -> tuple[Outcome, list[int], list[int]]:
    """The outcome, and the memory of the processes after a fifth of the time and at its end."""
    client, outcome = SseClient(url), Outcome()
    deadline = time.monotonic() + seconds

    async def one_client(seed: int) -> None:
        rng = random.Random(seed)
        await asyncio.sleep(rng.random())  # not all of them in the same millisecond
        while time.monotonic() < deadline:
            try:
                await one_answer(client, rng, leave, outcome)
            except OSError as error:
                outcome.answers[repr(error)] += 1

    clients = [asyncio.create_task(one_client(seed)) for seed in range(streams)]
    await asyncio.sleep(seconds / 5)
    early = memory(pid)
    await asyncio.gather(*clients)
    return outcome, early, memory(pid)


def memory(pid: int) -> list[int]:
    """Resident bytes of the server and its ranks."""
    process = psutil.Process(pid)
    return [each.memory_info().rss for each in (process, *process.children())]


async def wait_until(url: str, path: str, accept: re.Pattern[str]) -> str:
    client, text = SseClient(url), ""
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            answer = await client.request("GET", path)
            text = answer.body.decode()
            if answer.status == 200 and accept.search(text):
                return text
        await asyncio.sleep(0.2)
    raise TimeoutError(f"{path} does not come to {accept.pattern}:\n{text}")


def percentile(text: str, name: str, share: float) -> float:
    """The upper bound of the bucket that a percentile of a histogram lies in."""
    buckets = [(float(bound), float(n)) for bound, n in re.findall(rf'{name}_bucket{{le="([^"]+)"[^}}]*}} (\S+)', text)]
    total = buckets[-1][1]
    return next(bound for bound, count in buckets if count >= share * total)


async def run(args: argparse.Namespace, url: str, pid: int) -> tuple[dict[str, object], list[str]]:
    await wait_until(url, "/ready", re.compile("ready"))
    descriptors = psutil.Process(pid).num_fds()
    outcome, early, late = await soak(url, args.streams, args.seconds, args.leave, pid)
    at_rest = re.compile(
        r"(?s)num_used_tokens\{[^}]*} 0\.0\n.*num_used_tokens\{[^}]*} 0\.0\n|num_used_tokens\{[^}]*} 0\.0\n"
    )
    metrics = await wait_until(url, "/metrics", at_rest)
    await wait_until(url, "/flush_cache", re.compile("flushed"))  # refused while any request is left
    lags = {f"p{100 * share:g}": percentile(metrics, "nibble:event_loop_lag_seconds", share) for share in (0.5, 0.99)}
    problems = [f"{n} times {what}" for what, n in outcome.answers.items() if what not in ("complete", "left")]
    await asyncio.sleep(1)
    if (now := psutil.Process(pid).num_fds()) > descriptors + 2:
        problems.append(f"{now} file descriptors are open, {descriptors} were")
    problems += [
        f"memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB"
        for before, after in zip(early, late, strict=True)
        if after > before * (1 + args.growth)
    ]
    if lags["p99"] > MAX_LAG_SECONDS:
        problems.append(f"the event loop's lag has a 99th percentile of up to {lags['p99']} s")
    figures: dict[str, object] = {
        "benchmark": "soak",
        "streams": args.streams,
        "seconds": args.seconds,
        "answers": {name: n for name, n in outcome.answers.items() if name in ("complete", "left")},
        "tokens_per_second": round(outcome.tokens / args.seconds),
        "event_loop_lag_seconds_at_most": lags,
        "memory_mib_early": [round(each / 2**20) for each in early],
        "memory_mib_late": [round(each / 2**20) for each in late],
    }
    return figures, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="assets/nibble-demo-6m-nvfp4")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--leave", type=float, default=0.3, help="part of the answers that clients leave")
    parser.add_argument("--growth", type=float, default=0.05, help="part by which memory may grow")
    parser.add_argument("--port", type=int, default=30998)
    args = parser.parse_args()
    size = str(args.ranks)
    running = str(-(-args.streams // args.ranks))
    flags = ["--tp", size, "--dp", size, "--ep", size, "--enable-dp-attention", "--enable-flashinfer-cutlass-moe"]
    flags += ["--max-running-requests", running, "--max-queued-requests", str(args.streams), "--context-length", "512"]
    flags += ["--model-path", args.model_path, "--port", str(args.port), "--enable-metrics", "--log-level", "warning"]
    server = subprocess.Popen([sys.executable, "-m", "nibble.launch_server", *flags], env=dict(os.environ))
    try:
        figures, problems = asyncio.run(run(args, f"http://127.0.0.1:{args.port}", server.pid))
        if server.poll() is not None:
            problems.append(f"the server ended with {server.returncode}")
    finally:
        server.terminate()
        server.wait()
    for name, value in figures.items():
        print(f"{name:<34} {value}")
    print(json.dumps(figures))
    for problem in problems:
        print(f"problem: {problem}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
