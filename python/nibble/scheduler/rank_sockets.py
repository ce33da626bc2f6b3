"""The messages of a rank, from the engine's process and to it.

The ranks of an attention group must take the same decisions, and decide from nothing but their messages. So only the
first one listens to the engine: at every step it hands on what it has received, in one bundle, and the others take one
bundle a step. Their n-th step has the messages of the first one's n-th step, whenever these arrived; the abort of a
request is one of them. A group that sleeps waits here, without a deadline.
"""

from pathlib import Path

import msgspec
import zmq

from nibble.config.parallel_config import ParallelConfig
from nibble.ipc.messages import FromRank, ToRank, engine_address, rank_address


class RankSockets:
    def __init__(self, run_dir: Path, rank: int, parallel: ParallelConfig) -> None:
        self._context = zmq.Context()
        self._inbox = self._socket(zmq.PULL)
        self._inbox.bind(rank_address(run_dir, rank))
        self._engine_address = engine_address(run_dir)
        self._outbox = self._socket(zmq.PUSH)
        self._outbox.connect(self._engine_address)
        first, *others = parallel.attn_tp_ranks(rank)
        self.is_first_of_group = rank == first
        self._others = [self._socket(zmq.PUSH) for _ in others] if self.is_first_of_group else []
        for other, socket in zip(others, self._others, strict=False):
            socket.connect(rank_address(run_dir, other))
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, wait: bool) -> list[ToRank]:
        """All messages that have arrived; with `wait`, at least one. To be called once a step."""
        if self.is_first_of_group:
            messages = self._receive_from_engine(wait)
            for other in self._others:
                other.send_multipart([b"", *messages])  # a bundle can't be empty
        else:
            _, *messages = self._inbox.recv_multipart()
        return [self._decoder.decode(message) for message in messages]

    def send(self, message: FromRank) -> None:
        self._outbox.send(self._encoder.encode(message))

    def send_from_thread(self, message: FromRank) -> None:
        """`send` for other threads, to which the sockets must not be shown."""
        with self._socket(zmq.PUSH) as socket:
            socket.connect(self._engine_address)
            socket.send(msgspec.msgpack.encode(message))

    def answer(self, message: FromRank) -> None:
        """Sends what is the same on all ranks of the group, once."""
        if self.is_first_of_group:
            self.send(message)

    def close(self) -> None:
        """Returns when what was sent has been delivered, at most a second later."""
        self._context.destroy(linger=1000)

    def _receive_from_engine(self, wait: bool) -> list[bytes]:
        messages = [self._inbox.recv()] if wait else []
        while True:
            try:
                messages.append(self._inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return messages

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(0)
        return socket
