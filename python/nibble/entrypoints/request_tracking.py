"""What surrounds every HTTP request: its id, its line in the log, its place in the metrics."""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nibble.entrypoints.api_key import OPEN_PATHS
from nibble.entrypoints.errors import api_error
from nibble.observability.metrics import EngineMetrics
from nibble.observability.request_context import RequestContext, current_request
from nibble.observability.request_log import RequestLog
from nibble.utils.errors import EngineDeadError

REQUEST_ID_HEADER = "x-request-id"
UNLOGGED_PATHS = OPEN_PATHS | {"/metrics"}
"""What is asked every few seconds by machines."""


class RequestTrackingMiddleware:
    """Makes the request's id known to the logs and returns it; answers with a 500 what nobody foresaw."""

    def __init__(self, app: ASGIApp, metrics: EngineMetrics | None, request_log: RequestLog | None) -> None:
        self._app = app
        self._metrics = metrics
        self._log = request_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(Headers(scope=scope).get(REQUEST_ID_HEADER))
        token = current_request.set(context)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = context.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except (Exception, asyncio.CancelledError) as error:
            if status:
                raise
            if isinstance(error, asyncio.CancelledError):  # when the server stops, by uvicorn
                error = EngineDeadError("the server is shutting down")
            await api_error(error).response()(scope, receive, send_with_id)
        finally:
            if status:
                self._note(scope, context, status)
            current_request.reset(token)

    def _note(self, scope: Scope, context: RequestContext, status: int) -> None:
        if self._metrics is not None:
            self._metrics.on_response(getattr(scope.get("route"), "path", None), scope["method"], status)
        if self._log is not None and scope["path"] not in UNLOGGED_PATHS:
            self._log.on_response(context, scope["method"], scope["path"], status)
