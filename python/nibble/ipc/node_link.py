"""What the hosts of an engine say to each other: msgpack over one TCP connection from each to the first one.

A message is its length, four bytes, little-endian, and then itself. Both sides speak at least every
`heartbeat_seconds`, so that the silence of a host that is cut off is noticed; the death of a process is at once.
"""

import asyncio
import contextlib
from typing import Generic, TypeVar

import msgspec

from nibble.config.server_args import ServerArgs

MAX_HELLO_BYTES = 1 << 16
MAX_MESSAGE_BYTES = 1 << 30
_LENGTH_BYTES = 4

_HEARTBEAT_SECONDS = 1.0
_HEARTBEATS_PER_TIMEOUT = 10
_CLOSE_SECONDS = 1.0


def heartbeat_seconds(args: ServerArgs) -> float:
    """Often enough for those who wait for --dist-timeout, and for the watchdog, which looks at the steps in them."""
    return min(_HEARTBEAT_SECONDS, min(args.dist_timeout, args.watchdog_timeout) / _HEARTBEATS_PER_TIMEOUT)


class Hello(msgspec.Struct, frozen=True, tag=True):
    """From a host that has just connected. `settings` are those that all must share, see `shared_settings`."""

    node_rank: int
    version: str
    settings: dict[str, str]
    context_length: int
    num_pages: int | None


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """To every host, once all are there, with what is the first one's to decide."""

    random_seed: int
    context_length: int
    num_pages: int | None


class ForRank(msgspec.Struct, frozen=True, tag=True):
    """A message to a rank, encoded."""

    rank: int
    message: bytes


class OfRank(msgspec.Struct, frozen=True, tag=True):
    """A message of a rank, encoded."""

    message: bytes


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """What the ranks' grammar compilers read."""

    content: bytes


class Steps(msgspec.Struct, frozen=True, tag=True):
    """How many each rank of the host has made, and what the system says of their processes; the heartbeat of a host."""

    counts: dict[int, int]
    states: dict[int, str]


class RankEnded(msgspec.Struct, frozen=True, tag=True):
    rank: int
    code: int


class StillHere(msgspec.Struct, frozen=True, tag=True):
    """The heartbeat of the first host."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """To a host that has to end, for a `reason` if something failed; with `dump_stacks` ranks tell where they are."""

    reason: str | None
    dump_stacks: bool


ToNode = Welcome | ForRank | Vocabulary | StillHere | Goodbye
FromNode = Hello | OfRank | Steps | RankEnded

Sent = TypeVar("Sent")
Received = TypeVar("Received")


class LinkError(Exception):
    """Nothing more will come: the other side is gone, silent or does not speak this language."""


class NodeLink(Generic[Sent, Received]):
    """One end of a connection. Belongs to one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: type[Received]) -> None:
        self._reader, self._writer = reader, writer
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(received)

    def send(self, message: Sent) -> None:
        """Returns at once. Whether it arrives shows in what comes back."""
        if not self._writer.is_closing():
            encoded = self._encoder.encode(message)
            self._writer.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)

    async def receive(self, timeout_s: float, max_bytes: int = MAX_MESSAGE_BYTES) -> Received:
        """The next message. Raises LinkError."""
        try:
            async with asyncio.timeout(timeout_s):
                length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "little")
                if length > max_bytes:
                    raise LinkError(f"it announced a message of {length} bytes, and the most are {max_bytes}")
                return self._decoder.decode(await self._reader.readexactly(length))
        except TimeoutError:
            raise LinkError(f"it said nothing for {timeout_s:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError, OSError):
            raise LinkError("it has closed the connection") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LinkError(f"what it says is no message: {error}") from error

    async def close(self) -> None:
        """Delivers what was sent, if the other side takes it within a moment."""
        with contextlib.suppress(TimeoutError, ConnectionError, OSError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                self._writer.close()
                await self._writer.wait_closed()
        self._writer.transport.abort()
