"""Access with API keys."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nibble.entrypoints.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/ready", "/"})
"""What load balancers and orchestrators probe, and the playground's page; no key is ever needed."""

ADMIN_PATHS = frozenset(
    {
        "/abort_request",
        "/flush_cache",
        "/server_info",
        "/get_server_info",
        "/start_profile",
        "/stop_profile",
    }
)
"""What acts on requests of others, or tells how the server is run."""


class ApiKeyMiddleware:
    """Lets only requests pass that bear a key for their route: `Authorization: Bearer <key>`.

    With an admin key the routes of ADMIN_PATHS need it; without one they are like all others. With an API key every
    other route needs it, or the admin key, whether there is such a route or not.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, admin_api_key: str | None) -> None:
        self._app = app
        self._admin_keys = [key.encode() for key in (admin_api_key,) if key is not None]
        self._keys = [api_key.encode(), *self._admin_keys] if api_key is not None else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            is_admin = bool(self._admin_keys) and scope["path"] in ADMIN_PATHS
            accepted = [] if scope["path"] in OPEN_PATHS else self._admin_keys if is_admin else self._keys
            if accepted and not _bears_one_of(accepted, scope):
                key = "the admin API key" if is_admin else "an API key"
                message = f"this route needs {key}: send the header 'Authorization: Bearer <key>'"
                await ApiError(401, message, code="invalid_api_key").response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _bears_one_of(keys: list[bytes], scope: Scope) -> bool:
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    given = key.strip().encode("latin-1")
    # Every key is compared, and each in constant time, so that the time tells nothing.
    return scheme.lower() == "bearer" and sum(hmac.compare_digest(given, key) for key in keys) > 0
