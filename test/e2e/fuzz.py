"""Hostile clients: random, malformed, truncated, oversized and slow requests over raw sockets.

python test/e2e/fuzz.py --requests 10000        starts a server on the demo model, and exits with 1 if one request
                                                is answered with 500 or more, or hangs; if a process is lost, KV
                                                pages are held, or memory has grown by more than 2 %
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from server_process import Server, launch, parallel_flags

FLAGS = [*parallel_flags(2), "--enable-metrics", "--context-length", "256", "--max-total-tokens", "4096"]
FLAGS += ["--max-request-bytes", str(2**20), "--log-level", "error", "--tool-call-parser", "qwen"]
ANSWER_SECONDS = 30.0
"""A complete request that has no answer by then hangs."""
MEMORY_GROWTH = 0.02
WARM_UP = 0.2
"""Requests, beside those that count, after which the processes have the memory that they work with."""

WEATHER = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}}, "required": ["city"]}
HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
NAMED_SCHEMA = {"type": "json_schema", "json_schema": {"name": "weather", "schema": WEATHER}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 4}}),
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 4, "regex": "[a-f]{2,6}", "stop_regex": "f+e"}}),
    ("/generate", {"text": "Hi", "sampling_params": {"max_new_tokens": 4, "json_schema": WEATHER}}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 4}),
    ("/v1/completions", {"prompt": "Hi", "max_tokens": 4, "ebnf": 'root ::= "a" root | "b"', "stop_regex": ["a{3}"]}),
    ("/v1/chat/completions", HELLO),
    ("/v1/chat/completions", {**HELLO, "response_format": NAMED_SCHEMA}),
    ("/v1/chat/completions", {**HELLO, "tools": [TOOL], "tool_choice": "required"}),
    ("/v1/tokenize", {"prompt": "Hi"}),
    ("/v1/detokenize", {"tokens": [1]}),
    ("/abort_request", {"rid": "x"}),
]
PATHS = ["/health", "/ready", "/metrics", "/model_info", "/server_info", "/v1/models", "/flush_cache", "/openapi.json"]
NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**53, 2**63, -(2**63), 10**30, "", "x", "\x00",
    "\n\r\u2028", "💥" * 50, "a" * 5000, "(a+)+$", "[", "{{ 7 * 7 }}", "../../etc/passwd", [], [[]], [None], [0] * 300,
    [-1], [895], ["x"] * 70, [""], {}, {"": ""}, {"a": {"b": [1]}}, {"0": 1}, {"type": "object"},
    {"type": "json_schema"}, {"role": "user", "content": "Hi"},
    [{"role": "system", "content": "x"}], [{"role": "tool", "content": None}],
    "(?:(?:(?:a{60}){60}){60}){60}", "[a-f]{100000}", ["[a-f ]*[b-e ]*x{9}Q"] * 64, "(x+x+)+y", "(?x)a{6 0}",
    'root ::= "a"{999999}', "root ::= root", 'root ::= ("a"{60}){60}', 'root ::= "', [TOOL] * 100, "required", "auto",
    {"type": "array", "items": {"enum": list(range(2000))}}, {"type": "string", "maxLength": 10**6},
    {"type": "string", "pattern": "(?:(?:a{60}){60}){60}"}, {"$ref": "#"}, {"type": "object", "minProperties": 10**5},
    NAMED_SCHEMA, {"type": "json_schema", "json_schema": {"name": "x", "schema": {"minItems": 10**5, "type": "array"}}},
]  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """What one client sends, and whether an answer is due."""

    kind: str
    pieces: Sequence[bytes]
    pause: float = 0.0
    """Seconds between pieces."""
    is_complete: bool = True
    """Whether the server has all it needs to answer."""
    reads: int | None = None
    """Bytes read before the client resets the connection; None reads to the end."""


@dataclass
class Report:
    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def http_request(method: str, path: str, body: bytes = b"", *headers: bytes) -> bytes:
    head = [f"{method} {path} HTTP/1.1".encode(), b"host: test", b"connection: close", *headers]
    if body or method == "POST":
        head += [b"content-type: application/json", b"content-length: %d" % len(body)]
    return b"\r\n".join([*head, b"", b""]) + body


class Fuzzer:
    def __init__(self, seed: int, field_names: Sequence[str]) -> None:
        self.rng = random.Random(seed)
        self.field_names = list(field_names)
        self._kinds: list[tuple[Callable[[], Attack], int]] = [
            (self.mutated, 50), (self.valid, 10), (self.left, 10), (self.truncated, 8), (self.garbage, 8),
            (self.chunked, 4), (self.slow, 4), (self.elsewhere, 3), (self.oversized, 2), (self.pipelined, 1),
        ]  # fmt: skip

    def attack(self) -> Attack:
        (make,) = self.rng.choices([make for make, _ in self._kinds], [weight for _, weight in self._kinds])
        return make()

    # Kinds of attacks

    def valid(self) -> Attack:
        path, body = self.rng.choice(BODIES)
        return Attack("valid", [http_request("POST", path, json.dumps(body).encode())])

    def mutated(self) -> Attack:
        path, body = self.rng.choice(BODIES)
        body = json.loads(json.dumps(body))
        for _ in range(self.rng.randint(1, 3)):
            self._mutate(body)
        content = json.dumps(body).encode(errors="surrogatepass")
        if self.rng.random() < 0.2:
            content = self._damaged(content)
        return Attack("mutated", [http_request("POST", path, content)])

    def left(self) -> Attack:
        """The client goes away in mid-answer, or before."""
        body = {"text": "Hi", "stream": self.rng.random() < 0.8}
        body["sampling_params"] = {"max_new_tokens": 200, "ignore_eos": True, "n": self.rng.choice([1, 1, 3])}
        content = http_request("POST", "/generate", json.dumps(body).encode())
        return Attack("left", [content], reads=self.rng.choice([0, 1, 500, 5000]))

    def truncated(self) -> Attack:
        content = self.mutated().pieces[0]
        return Attack("truncated", [content[: self.rng.randrange(len(content))]], is_complete=False)

    def garbage(self) -> Attack:
        rng = self.rng
        lines = [
            rng.randbytes(rng.randint(1, 300)),
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET\x00/ HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\n" * rng.randint(1, 50),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64),
            http_request("POST", "/generate", b"{}", b"content-length: 7"),
            http_request("POST", "/generate", b"{}", b"transfer-encoding: chunked"),
            http_request("GET", "/health", b"", b"x: " + rng.randbytes(20).replace(b"\n", b"")),
            http_request("GET", "/health", b"", b"x" * rng.choice([100, 70_000, 300_000]) + b": y"),
            http_request("GET", "/health", b"", *[b"a%d: b" % i for i in range(rng.choice([10, 9000]))]),
            http_request("GET", "/" + "x" * rng.choice([1000, 70_000])),
            http_request("GET", "/health", b"", b"upgrade: websocket", b"connection: upgrade"),
            http_request("POST", "/generate", b"{}", b"expect: 100-continue"),
            http_request("POST", "/generate", b"{}", b"authorization: Bearer \xff\xfe"),
            http_request("POST", "/generate", b"{}", b"x-request-id: " + b"%0a\t\xe2\x80\xa8" * 50),
        ]
        return Attack("garbage", [rng.choice(lines)], is_complete=False)

    def chunked(self) -> Attack:
        path, body = self.rng.choice(BODIES)
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
        content = json.dumps(body).encode()
        cut = self.rng.randrange(1, len(content))
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (content[:cut], content[cut:])]
        is_sound = self.rng.random() < 0.5
        end = b"0\r\n\r\n" if is_sound else self.rng.choice([b"zz\r\n", b"-1\r\n\r\n", b"fffffffffffffffff\r\n", b""])
        pieces = [head.encode() + b"transfer-encoding: chunked\r\n\r\n", *chunks, end]
        return Attack("chunked", pieces, is_complete=is_sound)

    def slow(self) -> Attack:
        content = self.valid().pieces[0]
        step = max(1, len(content) // self.rng.randint(2, 8))
        return Attack("slow", [content[i : i + step] for i in range(0, len(content), step)], pause=0.05)

    def elsewhere(self) -> Attack:
        path = self.rng.choice(
            [*PATHS, *(path for path, _ in BODIES), "/%00", "/%ff", "//", "/v1/models/%2e%2e", "/generate?a[]=%", "/*"]
        )
        method = self.rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "PATCH"])
        return Attack("elsewhere", [http_request(method, path)])

    def oversized(self) -> Attack:
        path = self.rng.choice(BODIES)[0]
        content = json.dumps({"text": "x" * (3 * 2**20)}).encode()
        return Attack("oversized", [http_request("POST", path, content)], is_complete=False)

    def pipelined(self) -> Attack:
        request = self.valid().pieces[0].replace(b"connection: close\r\n", b"")
        return Attack("pipelined", [request * 3 + self.valid().pieces[0]])

    # Parts

    def _mutate(self, body: dict[str, Any]) -> None:
        target = body
        inner = body.get("sampling_params")
        if isinstance(inner, dict) and self.rng.random() < 0.5:
            target = inner
        name = self.rng.choice([*target, *self.field_names]) if self.rng.random() < 0.95 else self._text()
        if self.rng.random() < 0.1:
            target.pop(name, None)
        else:
            target[name] = self._value()

    def _value(self) -> Any:
        choice = self.rng.random()
        if choice < 0.8:
            return deepcopy(self.rng.choice(NASTY))
        if choice < 0.9:
            return self._text()
        value = deepcopy(self.rng.choice(NASTY))
        for _ in range(self.rng.choice([2, 5, 900])):
            value = [value] if self.rng.random() < 0.5 else {"a": value}
        return value

    def _text(self) -> str:
        return "".join(chr(self.rng.choice([self.rng.randrange(128), self.rng.randrange(0xD7FF)])) for _ in range(9))

    def _damaged(self, content: bytes) -> bytes:
        place = self.rng.randrange(len(content))
        wrong = self.rng.choice([b"", b"\xff", b"NaN", b"\\ud800", b"}", b"\x00"])
        return content[:place] + wrong + content[place + 1 :]


async def run_attack(attack: Attack, port: int, report: Report) -> None:
    report.kinds[attack.kind] += 1
    writer = None
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answer = await _conversation(attack, reader, writer)
    except TimeoutError:
        if attack.is_complete:
            report.failures.append(
                f"{attack.kind}: no answer within {ANSWER_SECONDS:g} s to {attack.pieces[0][:2000]!r}"
            )
        return
    except OSError as error:
        if attack.is_complete and attack.reads is None and not isinstance(error, ConnectionError):
            report.failures.append(f"{attack.kind}: {error!r} after {attack.pieces[0][:2000]!r}")
        return
    finally:
        if writer is not None:
            writer.transport.abort()
    status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") and answer[9:12].isdigit() else 0
    report.statuses[status] += 1
    if status >= 500 or (attack.kind in ("valid", "slow") and status != 200):
        report.failures.append(f"{attack.kind}: {status} {answer[-300:]!r} to {attack.pieces[0][:2000]!r}")


async def _conversation(attack: Attack, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    with contextlib.suppress(ConnectionError):  # refused while it is sent; the answer may have come before
        for piece in attack.pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(attack.pause)
        if not attack.is_complete:
            writer.write_eof()
    if attack.reads is None:
        return await reader.read(-1)
    answer = await reader.read(attack.reads)
    linger = struct.pack("ii", 1, 0)  # closing sends a reset
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    return answer


async def run_attacks(fuzzer: Fuzzer, count: int, concurrency: int, port: int) -> Report:
    report = Report()
    attacks = (fuzzer.attack() for _ in range(count))

    async def client() -> None:
        for attack in attacks:
            await run_attack(attack, port, report)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return report


def field_names(server: Server) -> list[str]:
    """Of all request bodies, so that new ones are attacked without being asked for."""
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    return sorted({name for schema in schemas.values() for name in schema.get("properties", {})})


def memory(server: Server) -> dict[str, int]:
    """Resident bytes of the server's processes."""
    ranks = {f"rank {rank}": pid for rank, pid in enumerate(server.info()["rank_process_ids"])}
    pids = {"server": server.process.pid, **ranks}
    return {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}


def problems_at_rest(server: Server, rank_ids: Sequence[int], seconds: float = 20) -> list[str]:
    """What is wrong with a server that nobody uses any more, after at most so many seconds to come to rest."""
    if server.process.poll() is not None:
        return [f"the server ended with code {server.process.returncode}"]
    deadline = time.monotonic() + seconds
    while (problems := _unrest(server)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if server.info()["rank_process_ids"] != list(rank_ids):
        problems.append("a rank was lost")
    if server.client.get("/health_generate").status_code != 200:
        problems.append("it can't generate")
    return problems


def _unrest(server: Server) -> list[str]:
    try:
        problems = [f"{n} requests still run" for n in server.info()["requests_per_rank"] if n]
        lines = server.client.get("/metrics").text.splitlines()
    except httpx.TransportError as error:
        return [f"it does not answer: {error!r}"]
    held = [line for line in lines if line.startswith("sglang:num_used_tokens{") and not line.endswith(" 0.0")]
    connections = [c for c in psutil.Process(server.process.pid).net_connections("tcp") if c.status == "ESTABLISHED"]
    if len(connections) > 1:
        problems.append(f"{len(connections) - 1} connections are still open")
    return problems + [f"KV pages are held: {line}" for line in held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, launch(Path(scratch) / "log", *FLAGS) as server:
        ranks = server.info()["rank_process_ids"]
        fuzzer = Fuzzer(args.seed, field_names(server))
        report = asyncio.run(run_attacks(fuzzer, int(WARM_UP * args.requests), args.concurrency, server.port))
        problems = report.failures + problems_at_rest(server, ranks)
        before = memory(server)
        started = time.monotonic()
        report = asyncio.run(run_attacks(fuzzer, args.requests, args.concurrency, server.port))
        seconds = time.monotonic() - started
        problems += report.failures + problems_at_rest(server, ranks)
        after = memory(server)
        problems += [
            f"memory of {name} grew from {before[name] / 2**20:.1f} to {after[name] / 2**20:.1f} MiB"
            for name in before
            if after[name] > before[name] * (1 + MEMORY_GROWTH)
        ]
        print(f"{args.requests} requests in {seconds:.0f} s; kinds: {dict(report.kinds.most_common())}")
        print(f"answers by status (0: closed without one): {dict(sorted(report.statuses.items()))}")
        print(
            "memory in MiB, before and after: "
            + ", ".join(f"{name} {before[name] / 2**20:.1f} {after[name] / 2**20:.1f}" for name in before)
        )
        for problem in problems[:20]:
            print(f"problem: {problem}")
        if problems:
            sys.exit(f"{len(problems)} problems\n{server.log.read_text()[-5000:]}")


if __name__ == "__main__":
    main()
