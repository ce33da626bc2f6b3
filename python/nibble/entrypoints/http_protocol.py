"""HTTP/1.1 with bounds on the head of a request: its size, and the time that a client takes to send it."""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nibble.entrypoints.errors import ApiError

MAX_HEAD_BYTES = 64 * 2**10
HEAD_TIMEOUT_S = 20.0


class HeadLimitMiddleware:
    """Refuses a head that is too large, however few packets it came in."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            parts = [
                scope["raw_path"],
                scope["query_string"],
                *(part for header in scope["headers"] for part in header),
            ]
            if sum(map(len, parts)) > MAX_HEAD_BYTES:
                await _too_large().response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol; it closes connections whose next request does not come to the end of its head."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._start_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        self._start_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser gives up."""
        self._refuse(ApiError(400, msg))

    def _start_head(self) -> None:
        if self._head_timer is None:
            error = ApiError(408, f"the head of the request did not arrive within {HEAD_TIMEOUT_S:g} s")
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, error)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer, self._head_bytes = None, 0

    def _refuse(self, error: ApiError) -> None:
        """Answers, unless an earlier request of the connection is being answered, and closes the connection."""
        if self.transport.is_closing():
            return
        if self._head_bytes and (self.cycle is None or self.cycle.response_complete):
            body = error.body()
            head = f"HTTP/1.1 {error.status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self._end_head()
        self.transport.close()


def _too_large() -> ApiError:
    return ApiError(431, f"the head of the request is larger than the limit of {MAX_HEAD_BYTES} bytes")
