"""Runs a function on every rank, each rank a process of its own, and re-raises a rank's failure.

    with RankProcesses(world_size=3, run_dir=tmp_path) as ranks:
        results = ranks.run(function, sizes=[1, 2, 3])  # in rank order

`function(rank, **arguments)` is a top-level function of any file and gets a `Rank`. It is passed on as file and
name; arguments and results travel as JSON. The processes have RANK and WORLD_SIZE in their environment, import torch
once and serve many calls. They end with their parent, however that one dies.
"""

import contextlib
import ctypes
import faulthandler
import importlib.util
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

GRACE_S = 3.0  # for the other ranks to answer after one has failed
END_S = 10.0  # for all ranks to end
PR_SET_PDEATHSIG = 1


@dataclass
class Rank:
    """What a function knows about its process. `state` is kept from call to call."""

    rank: int
    world_size: int
    run_dir: Path
    state: dict[str, Any] = field(default_factory=dict)


class RankFailure(AssertionError):
    """A rank raised, died or did not answer in time."""


class RankProcesses:
    """The processes start when they are needed: at first, and after a call failed, which ends them all.

    `run_dir` is a new directory under the given one at every start, so that no run finds another's files.
    """

    def __init__(self, world_size: int, run_dir: Path, timeout_s: float = 60.0) -> None:
        self.world_size = world_size
        self.run_dir = run_dir
        self.timeout_s = timeout_s
        self._parent_dir = run_dir
        self._processes: dict[int, tuple[subprocess.Popen[bytes], Connection]] = {}

    def run(
        self, function: Callable[..., Any], /, *, ranks: Sequence[int] | None = None, **arguments: Any
    ) -> list[Any]:
        """Calls the function on `ranks` (all by default) at once. Returns their results, in the order of `ranks`."""
        self.start(function, ranks=ranks, **arguments)
        return self.results(ranks)

    def start(self, function: Callable[..., Any], /, *, ranks: Sequence[int] | None = None, **arguments: Any) -> None:
        """As `run`, without waiting; `results` waits."""
        call = {"file": inspect.getsourcefile(function), "name": function.__name__, "arguments": arguments}
        ranks = self._all_unless(ranks)
        if not self._processes:
            self.run_dir = Path(tempfile.mkdtemp(dir=self._parent_dir))
        for rank in ranks:
            if rank not in self._processes:
                self._processes[rank] = self._spawn(rank)
        for rank in ranks:
            self._processes[rank][1].send_bytes(json.dumps(call).encode())

    def results(self, ranks: Sequence[int] | None = None) -> list[Any]:
        ranks = self._all_unless(ranks)
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + self.timeout_s
        pending = {self._processes[rank][1]: rank for rank in ranks}
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            for connection in [connection for connection in pending if connection in ready]:
                rank = pending.pop(connection)
                try:
                    answer = json.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    answer = {"failure": f"the process ended with exit code {self._processes[rank][0].wait()}"}
                if "failure" in answer:
                    failures.append(f"rank {rank}: {answer['failure']}")
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                else:
                    results[rank] = answer["result"]
            if not ready:
                failures += [f"rank {rank}: no answer (its stack is in stderr)" for rank in pending.values()]
                for rank in pending.values():
                    self._processes[rank][0].send_signal(signal.SIGUSR1)
                time.sleep(0.2)
                break
        if failures:
            self._kill_all()
            raise RankFailure("\n".join(failures))
        return [results[rank] for rank in ranks]

    def kill(self, rank: int) -> None:
        """SIGKILL. What the rank was doing is forgotten; the others go on."""
        process, connection = self._processes.pop(rank)
        process.kill()
        process.wait()
        connection.close()

    def close(self) -> None:
        """The ranks end by themselves: under MPS whoever is killed amid a kernel takes others with it."""
        for _, connection in self._processes.values():
            connection.close()
        deadline = time.monotonic() + END_S
        for process, _ in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._kill_all()

    def _kill_all(self) -> None:
        for rank in list(self._processes):
            self.kill(rank)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _all_unless(self, ranks: Sequence[int] | None) -> Sequence[int]:
        return range(self.world_size) if ranks is None else ranks

    def _spawn(self, rank: int) -> tuple[subprocess.Popen[bytes], Connection]:
        ours, theirs = Pipe()
        command = [sys.executable, __file__, rank, self.world_size, self.run_dir, theirs.fileno(), os.getpid()]
        process = subprocess.Popen(
            [str(word) for word in command],
            env=os.environ | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(self.world_size)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        return process, ours


def run_ranks(
    function: Callable[..., Any], world_size: int, run_dir: Path, timeout_s: float = 60.0, **arguments: Any
) -> list[Any]:
    """Calls the function once on each of `world_size` new processes. Returns their results in rank order."""
    with RankProcesses(world_size, run_dir, timeout_s) as ranks:
        return ranks.run(function, **arguments)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def _serve(rank: Rank, connection: Connection) -> None:
    modules: dict[str, ModuleType] = {}
    while True:
        call = json.loads(connection.recv_bytes())
        try:
            if call["file"] not in modules:
                modules[call["file"]] = _import(Path(call["file"]))
            result = getattr(modules[call["file"]], call["name"])(rank, **call["arguments"])
            answer = json.dumps({"result": result})
        except Exception:
            answer = json.dumps({"failure": traceback.format_exc()})
        connection.send_bytes(answer.encode())


def _import(file: Path) -> ModuleType:
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _main() -> None:
    rank, world_size, run_dir, descriptor, parent = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        return
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed its end, or has gone
        _serve(Rank(int(rank), int(world_size), Path(run_dir)), Connection(int(descriptor)))
    try:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    finally:
        os._exit(0)  # what a test has left behind needs no order to end in


if __name__ == "__main__":
    _main()
