"""A client for measurements: little work for each event, so that it measures the server and not itself."""

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httptools
import orjson

from nibble.utils.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """`body` is empty where events were taken by a callback."""

    status: int
    body: bytes

    def error(self) -> str:
        """What a refusal says, on one line."""
        try:
            return str(orjson.loads(self.body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return self.body[:200].decode(errors="replace")


class SseClient:
    """Posts JSON to one server, each request over a connection of its own."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """Raises ConfigError for what is no http or https URL."""
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or url.hostname is None:
            raise ConfigError(f"--base-url must look like http://127.0.0.1:30000, got {base_url!r}")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._path = url.path.rstrip("/")
        authorization = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"host: {url.netloc}\r\ncontent-type: application/json\r\nconnection: close\r\n{authorization}"

    async def request(
        self, method: str, path: str, body: Any = None, on_event: Callable[[bytes], None] | None = None
    ) -> Answer:
        """Raises OSError when the connection fails, also in mid-answer.

        `on_event` is called with the data of each server-sent event as it arrives, `[DONE]` included.
        """
        content = b"" if body is None else orjson.dumps(body)
        head = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}content-length: {len(content)}\r\n\r\n"
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(head.encode() + content, on_event), self._host, self._port, ssl=self._tls
        )
        try:
            return await connection.answer
        finally:
            connection.close()


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, on_event: Callable[[bytes], None] | None) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._request = request
        self._on_event = on_event
        self._parser = httptools.HttpResponseParser(self)
        self._body = bytearray()
        self._is_stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is no HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection before the answer was complete"))

    def close(self) -> None:
        self._transport.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._is_stream = self._on_event is not None and value.startswith(b"text/event-stream")

    def on_body(self, body: bytes) -> None:
        self._body += body
        if self._is_stream and self._on_event is not None:
            *events, rest = self._body.split(b"\n\n")
            self._body = rest
            for event in events:
                self._on_event(bytes(event.removeprefix(b"data: ")))

    def on_message_complete(self) -> None:
        if not self.answer.done():
            self.answer.set_result(Answer(self._parser.get_status_code(), bytes(self._body)))

    def _fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
