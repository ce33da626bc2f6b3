"""What the HTTP process adds to the engine's own time per token: streams over HTTP beside streams of `Engine`.

    python benchmark/http_overhead.py --ranks 2

Starts an engine in this process and a server with the same options, on the same cores, and has each of them answer
the same prompts as --streams concurrent streams, one after the other, --repeats times; each figure is the best round.
The clients run in this process, so what they take counts against HTTP, too. Prints a table and one line of JSON.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibble
from nibble.cli.sse_client import SseClient
from nibble.config.server_args import ServerArgs, non_default_options

PROMPT_TOKENS = 24
STARTUP_SECONDS = 120


def requests(streams: int, new_tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return [
        {"input_ids": [rng.randrange(3, vocab_size) for _ in range(PROMPT_TOKENS)], "sampling_params": sampling}
        for _ in range(streams)
    ]


async def engine_streams(engine: nibble.Engine, bodies: list[dict[str, Any]]) -> None:
    async def one(body: dict[str, Any]) -> None:
        async for _ in await engine.async_generate(stream=True, **body):
            pass

    await asyncio.gather(*map(one, bodies))


async def engine_answers(engine: nibble.Engine, bodies: list[dict[str, Any]]) -> None:
    await engine.async_generate(
        input_ids=[body["input_ids"] for body in bodies], sampling_params=bodies[0]["sampling_params"]
    )


async def native_streams(client: SseClient, bodies: list[dict[str, Any]]) -> None:
    await _stream(client, "/generate", [{**body, "stream": True} for body in bodies])


async def openai_streams(client: SseClient, bodies: list[dict[str, Any]]) -> None:
    fields = {"temperature": 0, "ignore_eos": True, "stream": True}
    limit = bodies[0]["sampling_params"]["max_new_tokens"]
    completions = [{"prompt": body["input_ids"], "max_tokens": limit, **fields} for body in bodies]
    await _stream(client, "/v1/completions", completions)


async def _stream(client: SseClient, path: str, bodies: list[dict[str, Any]]) -> None:
    async def one(body: dict[str, Any]) -> None:
        last: list[bytes] = [b""]

        def on_event(data: bytes) -> None:
            last[0] = data

        answer = await client.request("POST", path, body, on_event)
        assert answer.status == 200 and last[0] == b"[DONE]", answer

    await asyncio.gather(*map(one, bodies))


async def best_seconds(repeats: int, ways: dict[str, Callable[[], Awaitable[None]]]) -> dict[str, float]:
    """Of each way the fastest of `repeats` rounds, after one that warms up; the ways take turns."""
    best = dict.fromkeys(ways, float("inf"))
    for round in range(repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            await run()
            if round:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


async def measure(engine: nibble.Engine, url: str, streams: int, new_tokens: int, repeats: int) -> dict[str, float]:
    """Microseconds per token."""
    client = SseClient(url)
    deadline = time.monotonic() + STARTUP_SECONDS
    while True:
        try:
            if (await client.request("GET", "/ready")).status == 200:
                break
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError("the server does not get ready")
        await asyncio.sleep(0.1)
    bodies = requests(streams, new_tokens, engine.config.model.vocab_size)
    seconds = await best_seconds(
        repeats,
        {
            "Engine, whole answers": lambda: engine_answers(engine, bodies),
            "Engine, streams": lambda: engine_streams(engine, bodies),
            "HTTP, /generate streams": lambda: native_streams(client, bodies),
            "HTTP, /v1/completions streams": lambda: openai_streams(client, bodies),
        },
    )
    return {name: 1e6 * value / (streams * new_tokens) for name, value in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default="assets/nibble-demo-6m-nvfp4")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--port", type=int, default=30999)
    args = parser.parse_args()
    options = ServerArgs(
        model_path=args.model_path,
        tp_size=args.ranks,
        dp_size=args.ranks,
        ep_size=args.ranks,
        enable_dp_attention=args.ranks > 1,
        enable_flashinfer_cutlass_moe=args.ranks > 1,
        disable_radix_cache=True,  # every round computes its prompts
        log_level="warning",
        port=args.port,
    )
    command = [sys.executable, "-m", "nibble.launch_server", *non_default_options(options).split()]
    server = subprocess.Popen(command, cwd=Path.cwd())
    try:
        with nibble.Engine(**asdict(options)) as engine:
            url = f"http://127.0.0.1:{args.port}"
            figures = asyncio.run(measure(engine, url, args.streams, args.new_tokens, args.repeats))
    finally:
        server.terminate()
        server.wait()
    own = figures["Engine, streams"]
    print(f"µs per token at {args.streams} concurrent requests")
    for name, value in figures.items():
        print(f"{name:<32} {value:>8.1f} {100 * (value / own - 1):>+7.0f} %")
    print(json.dumps({"benchmark": "http_overhead", "streams": args.streams, "ranks": args.ranks, "us": figures}))


if __name__ == "__main__":
    main()
