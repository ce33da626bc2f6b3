"""The connection between two hosts: messages arrive whole and in order, and its end is noticed, whatever it is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from nibble.ipc.node_link import FromNode, Goodbye, LinkError, NodeLink, OfRank, ToNode

Link = NodeLink[FromNode, ToNode]
LONG_S = 20.0


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Link, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A link, and the bare other end."""
    others: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    server = await asyncio.start_server(lambda *streams: others.put_nowait(streams), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    other_reader, other_writer = await others.get()
    yield NodeLink(reader, writer, ToNode), other_reader, other_writer
    writer.close()
    other_writer.close()
    server.close()


def test_messages_arrive_whole_and_in_order():
    async def scenario() -> None:
        async with connected() as (link, reader, writer):
            other: NodeLink[ToNode, FromNode] = NodeLink(reader, writer, FromNode)
            messages = [OfRank(bytes([i]) * size) for i, size in enumerate([0, 1, 100_000, 3_000_000, 5])]
            for message in messages:
                link.send(message)
            assert [await other.receive(LONG_S) for _ in messages] == messages
            other.send(Goodbye("why", True))
            assert await link.receive(LONG_S) == Goodbye("why", True)

    asyncio.run(scenario())


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _stop_in_the_middle(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x10\x00\x00\x00half")
    writer.close()


async def _speak_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET / HTTP/1.1\r\n\r\n")


async def _send_no_message(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x02\x00\x00\x00\xc0\xc1")


async def _send_broken_text(writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x08\x00\x00\x00\x81\xa4type\xa1\xff")


async def _send_a_deep_nest(writer: asyncio.StreamWriter) -> None:
    nest = b"\x82\xa4type\xa9StillHere\xa1x" + b"\x91" * 50_000 + b"\xc0"
    writer.write(len(nest).to_bytes(4, "little") + nest)


async def _be_silent(writer: asyncio.StreamWriter) -> None:
    pass


@pytest.mark.parametrize(
    ("do", "reason"),
    [
        (_close, "it has closed the connection"),
        (_stop_in_the_middle, "it has closed the connection"),
        (_speak_http, "it announced a message of 542393671 bytes, and the most are 1048576"),
        (_send_no_message, "what it says is no message"),
        (_send_broken_text, "what it says is no message: 'utf-8' codec can't decode"),
        (_send_a_deep_nest, "what it says is no message: maximum recursion depth"),
        (_be_silent, r"it said nothing for 0\.2 s"),
    ],
)
def test_whatever_ends_a_connection_is_an_error_that_says_so(
    do: Callable[[asyncio.StreamWriter], Awaitable[None]], reason: str
):
    async def scenario() -> None:
        async with connected() as (link, _, writer):
            await do(writer)
            with pytest.raises(LinkError, match=reason):
                await link.receive(0.2 if do is _be_silent else LONG_S, max_bytes=1 << 20)
            link.send(OfRank(b"into the void"))
            await link.close()

    asyncio.run(scenario())
