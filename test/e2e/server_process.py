"""Starts the real server on the demo model and looks at its processes."""

import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from forked_server import ForkedServer
from rank_processes import free_port

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"


def parallel_flags(ranks: int) -> list[str]:
    size = str(ranks)
    return ["--tp", size, "--dp", size, "--ep", size, "--enable-dp-attention", "--enable-flashinfer-cutlass-moe"]


class Server:
    """A running `python -m nibble.launch_server`."""

    def __init__(
        self, process: subprocess.Popen[str] | ForkedServer, port: int, log: Path, tls: str | None = None
    ) -> None:
        """`tls`: the authority of the server's certificate, if it speaks HTTPS."""
        self.process = process
        self.port = port
        self.log = log
        self.tls = tls
        verify = True if tls is None else ssl.create_default_context(cafile=tls)
        self.client = httpx.Client(base_url=self.url, timeout=60, verify=verify)

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://127.0.0.1:{self.port}"

    def wait_until_ready(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()}"
            try:
                if self.client.get("/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(f"not ready within {seconds} s:\n{self.log.read_text()}")

    def generate(self, **body: object) -> dict:
        response = self.client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def info(self) -> dict:
        return self.client.get("/server_info").json()

    def rank_processes(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in self.info()["rank_process_ids"]]

    def wait_for_exit(self, seconds: float = 15) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.log.read_text()}") from None


@contextmanager
def launch(
    log: Path,
    *flags: str,
    model: Path = DEMO_MODEL,
    ready: bool = True,
    faults: str = "",
    tls: str | None = None,
    forked: bool = True,
) -> Iterator[Server]:
    """A server that is gone when the block ends, whatever happened in it.

    `faults`: see nibble.scheduler.fault_injection. `tls`: see Server. `forked`: not by the command itself, see
    forked_server.py.
    """
    port = free_port()
    options = ["--model-path", str(model), "--port", str(port), *flags]
    environment = {**os.environ, "NIBBLE_TEST_FAULTS": faults}
    start = ForkedServer if forked else run_command
    process = start(options, log, environment)
    server = Server(process, port, log, tls)
    try:
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        process.kill()
        process.wait()
        server.client.close()


def run_command(options: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nibble.launch_server", *options]
    with log.open("w") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
        )


def processes_of(server_pid: int) -> list[psutil.Process]:
    """The server's descendants."""
    try:
        return psutil.Process(server_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_until_gone(processes: list[psutil.Process], seconds: float = 10) -> None:
    """Or are zombies: whoever inherits them from a server that was killed lets them wait for their burial."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"still running after {seconds} s: {alive}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def stopped(ranks: list[psutil.Process]) -> Iterator[None]:
    """What runs and waits on the ranks does so at least until the block ends."""
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            rank.resume()


def shared_files() -> set[str]:
    """What engines may leave behind: directories for sockets and segments of shared memory."""
    shared = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")} if os.path.isdir("/dev/shm") else set()
    return shared | {str(folder) for folder in Path(tempfile.gettempdir()).glob("nibble-*")}


def events(response: httpx.Response) -> Iterator[dict]:
    """The JSON of each server-sent event up to [DONE]."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@contextmanager
def unread_stream(server: Server, request: dict) -> Iterator[None]:
    """A stream whose client reads nothing and has room for little."""
    body = json.dumps({**request, "stream": True, "return_logprob": True, "top_logprobs_num": 20}).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head.encode() + body)
        yield


class Load:
    """Many clients at once, half of them streaming; `outcomes` says of each how its request ended."""

    def __init__(self, server: Server, count: int, request: dict) -> None:
        self._pool = ThreadPoolExecutor(count)
        self._client = httpx.Client(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=None))
        requests = [{**request, "stream": index % 2 == 0} for index in range(count)]
        self._futures: list[Future[str]] = [self._pool.submit(self._ask, request) for request in requests]

    def _ask(self, request: dict) -> str:
        with self._client.stream("POST", "/generate", json=request) as response:
            if response.status_code == 200 and request["stream"]:
                last = list(events(response))[-1]
            else:
                last = json.loads(response.read())
        if "error" in last:
            return last["error"]["code"]
        return "answer" if last["meta_info"]["finish_reason"] else "cut off"

    def outcomes(self) -> list[str]:
        done, late = wait(self._futures, timeout=30)
        assert not late, f"{len(late)} requests were never answered"
        self._pool.shutdown()
        self._client.close()
        return [future.result() for future in done]


def wait_for_load(server: Server, requests: int) -> None:
    deadline = time.monotonic() + 20
    while sum(server.info()["requests_per_rank"]) < requests:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_log(server: Server, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in server.log.read_text():
        assert time.monotonic() < deadline, f"no {text!r} in the log:\n{server.log.read_text()}"
        time.sleep(0.02)
