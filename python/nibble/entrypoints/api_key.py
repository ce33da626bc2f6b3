"""Access with an API key."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nibble.entrypoints.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What load balancers and orchestrators probe; everything else needs the key."""


class ApiKeyMiddleware:
    """Lets only requests pass that bear the key: `Authorization: Bearer <key>`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._bears_key(scope):
            message = "this server needs an API key: send the header 'Authorization: Bearer <key>'"
            await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _bears_key(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._api_key)
