"""The playground: one page at `/` to chat with the model and look at the engine."""

from pathlib import Path

from fastapi import APIRouter, Response

# The page brings everything it needs, and nothing that it shows can make it load or run anything else.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
_PAGE = (Path(__file__).parent / "playground.html").read_bytes()

router = APIRouter(include_in_schema=False)


@router.get("/")
async def playground() -> Response:
    """Needs no key; what it asks the server for does."""
    return Response(_PAGE, headers={"content-security-policy": _POLICY}, media_type="text/html; charset=utf-8")
