"""Starts the rank processes and sees them end."""

import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from nibble.config.resolve import EngineConfig
from nibble.ipc.messages import stacks_written_path
from nibble.utils.process import module_command, module_environment
from nibble.utils.stacks import ask_for_stacks

logger = logging.getLogger(__name__)

_STOP_SECONDS = 1.5
"""What all ranks together get to end by themselves."""
_STACK_SECONDS = 2.0
"""What each rank gets to write where it is."""


class Supervisor:
    """One thread per rank starts it and waits for its end; `on_exit(rank, code)` is called from that thread.

    A rank lives no longer than this process: it watches the pipe that is its standard input, and the kernel kills
    it when the thread that started it ends (so that thread must stay, which is why it does the waiting).
    """

    def __init__(
        self, config: EngineConfig, ranks: Sequence[int], run_dir: Path, on_exit: Callable[[int, int], None]
    ) -> None:
        self._config_line = msgspec.json.encode(config) + b"\n"
        self._gpu_environment = _gpu_environment(config)
        self._run_dir = run_dir
        self._on_exit = on_exit
        self._stopping = False
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in ranks
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, dump_stacks: bool = False) -> None:
        """Ends all ranks, with `dump_stacks` after they told where they are; returns when none is left.

        May be called twice.
        """
        self._stopping = True
        if dump_stacks:
            self._dump_stacks()
        for process in self._started():
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()
        deadline = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        for process in self._started():
            if process.poll() is None:
                logger.warning("process %d did not end by itself and is killed", process.pid)
                process.kill()
                process.wait()

    def _dump_stacks(self) -> None:
        """Has the ranks write their stacks to standard error, one after the other, so that they can be told apart."""
        for rank, process in sorted(self._processes.items()):
            if process.poll() is not None:
                continue
            if not ask_for_stacks(process.pid, stacks_written_path(self._run_dir, rank), _STACK_SECONDS):
                logger.warning("rank %d does not say where it is", rank)

    def states(self) -> dict[int, str]:
        """What the system says of each rank's process: running, sleeping, stopped, disk-sleep, …"""
        return {rank: _status(pid) for rank, pid in self.process_ids.items()}

    @property
    def process_ids(self) -> dict[int, int]:
        """By rank."""
        return {rank: process.pid for rank, process in sorted(self._processes.items())}

    def _started(self) -> list[subprocess.Popen[bytes]]:
        return list(self._processes.values())

    def _run(self, rank: int) -> None:
        process = subprocess.Popen(
            module_command("nibble.scheduler.rank_process", str(rank), str(self._run_dir)),
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal must not reach the ranks before their parent
            # Threads that wait actively for each other stand in each other's way where cores are shared.
            env={"OMP_WAIT_POLICY": "PASSIVE", **self._gpu_environment, **module_environment()},
        )
        self._processes[rank] = process
        assert process.stdin is not None
        try:
            process.stdin.write(self._config_line)
            process.stdin.flush()
            if self._stopping:
                process.stdin.close()
        except OSError:
            pass  # the rank is gone already; its exit code tells
        code = process.wait()
        if not self._stopping:
            self._on_exit(rank, code)


def _status(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"


def _gpu_environment(config: EngineConfig) -> dict[str, str]:
    """What ranks on GPUs need in their environment. Warns when they share one and would take turns on it."""
    if config.device == "cpu" or config.parallel.world_size == 1:
        return {}
    from nibble.distributed.pynccl import multi_rank_gpu_environment

    if config.ranks_per_gpu > 1 and not is_mps_running():
        logger.warning(
            "%d ranks share a GPU and NVIDIA's Multi-Process Service is off: their kernels take turns, which costs "
            "milliseconds a layer. Start it with: nvidia-cuda-mps-control -d",
            config.ranks_per_gpu,
        )
    return multi_rank_gpu_environment(config.ranks_per_gpu)


def is_mps_running() -> bool:
    """Whether a Multi-Process Service takes clients where this environment looks for it."""
    return (Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control").exists()
