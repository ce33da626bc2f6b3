"""The ranks of one host: their processes, and the messages from and to them."""

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
import zmq.asyncio

from nibble.config.resolve import EngineConfig
from nibble.controller.supervisor import Supervisor
from nibble.ipc.messages import engine_address, rank_address
from nibble.ipc.progress import ProgressBoard


class Host:
    """Belongs to one event loop, in which `on_exit(rank, code)` is called for every rank that ends by itself."""

    def __init__(self, config: EngineConfig, ranks: Sequence[int], on_exit: Callable[[int, int], None]) -> None:
        """Whole attention groups. Nothing runs before `start`."""
        self._loop, self._on_exit = asyncio.get_running_loop(), on_exit
        self.run_dir = Path(tempfile.mkdtemp(prefix="nibble-"))  # mode 0700
        self._context = zmq.asyncio.Context()
        self._from_ranks = self._socket(zmq.PULL)
        self._from_ranks.bind(engine_address(self.run_dir))
        self._to_ranks: dict[int, zmq.asyncio.Socket] = {}
        for rank in ranks:
            if rank == config.parallel.first_rank(config.parallel.dp_rank(rank)):  # it hands on to its group
                self._to_ranks[rank] = self._socket(zmq.PUSH)
                self._to_ranks[rank].connect(rank_address(self.run_dir, rank))
        self._progress = ProgressBoard(self.run_dir, config.parallel.world_size)
        self._supervisor = Supervisor(config, ranks, self.run_dir, self._on_exit_in_thread)

    def start(self) -> None:
        self._supervisor.start()

    def has(self, rank: int) -> bool:
        """Whether messages for this rank, the first of its attention group, can be sent here."""
        return rank in self._to_ranks

    def send(self, rank: int, message: bytes) -> None:
        # Without a high-water mark a send is taken at once, in order; the future is done when it returns.
        self._to_ranks[rank].send(message)

    async def receive(self) -> bytes:
        """The next message of any rank."""
        message: bytes = await self._from_ranks.recv()
        return message

    def steps(self) -> list[int]:
        """How many each rank has made; of those on other hosts 0."""
        return self._progress.read()

    def states(self) -> dict[int, str]:
        """What the system says of each rank's process."""
        return self._supervisor.states()

    @property
    def process_ids(self) -> dict[int, int]:
        """By rank."""
        return self._supervisor.process_ids

    async def stop(self, dump_stacks: bool) -> None:
        """Ends all ranks, with `dump_stacks` after they told where they are, and removes what they left."""
        await asyncio.to_thread(self._supervisor.stop, dump_stacks=dump_stacks)
        self._context.destroy(linger=0)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        return socket

    def _on_exit_in_thread(self, rank: int, code: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._on_exit, rank, code)
