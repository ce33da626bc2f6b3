"""Server-sent events, and the end of a request when its client goes away."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from nibble.entrypoints.errors import ClientDisconnectedError, api_error

T = TypeVar("T")
EventGenerator = AsyncGenerator[bytes, None]

DONE_EVENT = b"data: [DONE]\n\n"


def answers_with(media_type: str) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route, for the schema of the API: text of this type, beside what its `response_class` says."""
    return {200: {"content": {media_type: {"schema": {"type": "string"}}}}}


def json_response(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def json_event(content: Any) -> bytes:
    """One event, on a single line whatever the content."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client disconnects first, cancels it and raises ClientDisconnectedError.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnectedError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def event_stream(request: Request, events: EventGenerator) -> Response:
    """Streams `events`, after waiting for the first: a request that fails before it gets a status, not a stream."""

    async def first_event() -> bytes:
        return await anext(events)

    return EventStreamResponse(await while_connected(request.receive, first_event()), events)


class EventStreamResponse(Response):
    """A stream whose generator is closed however it ends; Starlette's own leaves that to the garbage collector.

    An error once the stream has begun becomes the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: EventGenerator) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientDisconnectedError:
            pass
        finally:
            await self._rest.aclose()

    async def _send(self, send: Send) -> None:
        async def send_body(content: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": content, "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_body(self._first)
        try:
            async for event in self._rest:
                await send_body(event)
        except Exception as error:
            await send_body(b"data: " + api_error(error).body() + b"\n\n")
        await send_body(b"", more=False)
