"""How bodies are read: never more than the limit, and as strict JSON."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

BODY_TIMEOUT_S = 120.0


class JsonRequest(Request):
    """A request whose body is bounded while it is read, in size and in time, and parsed by orjson.

    orjson refuses NaN, infinities, lone surrogates and nesting deeper than 1024. The limit is
    `app.state.max_request_bytes`.
    """

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    self._body = await self._read_body(self.app.state.max_request_bytes)
            except TimeoutError:
                message = f"the request body did not arrive within {BODY_TIMEOUT_S:g} s"
                raise HTTPException(408, message, {"connection": "close"}) from None
        return self._body

    async def json(self) -> Any:
        return orjson.loads(await self.body())

    async def _read_body(self, limit: int) -> bytes:
        if int(self.headers.get("content-length", 0)) > limit:
            raise _too_large(limit)
        content = bytearray()
        async for chunk in self.stream():
            content += chunk
            if len(content) > limit:
                raise _too_large(limit)
        return bytes(content)


class JsonRoute(APIRoute):
    """A route that hands `JsonRequest`s to its endpoint."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return handle_json


def _too_large(limit: int) -> HTTPException:
    # FastAPI passes this type, and no other, on from where bodies are read.
    return HTTPException(413, f"the request body is larger than the limit of {limit} bytes")
