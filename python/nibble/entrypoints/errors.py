"""Every error that a client sees, in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import logging
from collections.abc import Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from nibble.utils.errors import EngineDeadError, OverloadedError, RequestError

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
_LONGEST_SHOWN_VALUE = 80
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "request_too_large"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An error with its HTTP status; `param` names the field at fault as a path like `messages.0.content`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        detail = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": detail})

    def response(self) -> Response:
        headers = {}
        if self.code == "overloaded":
            headers["retry-after"] = str(RETRY_AFTER_S)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, "application/json")


class GenerationFailedError(RuntimeError):
    """The engine gave up on a generation that nobody asked it to abort."""


class ClientDisconnectedError(Exception):
    """The client closed the connection before it had its answer."""


def api_error(error: Exception) -> ApiError:
    """The error as the client is told of it. What was not foreseen is logged and told without its details."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), error.field)
        case OverloadedError():
            return ApiError(503, str(error), code="overloaded")
        case EngineDeadError():
            return ApiError(503, str(error), code="engine_dead")
        case GenerationFailedError():
            return ApiError(500, str(error), code="generation_failed")
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), code=_HTTP_CODES.get(error.status_code))
    logger.error("unexpected error while serving a request", exc_info=error)
    return ApiError(500, "internal server error")


def validation_error(errors: Sequence[dict[str, Any]], body: Any) -> ApiError:
    """One message out of pydantic's list of errors: field, value and limit."""
    # Of several alternatives (a string or a list of strings) the one that was meant fails deepest inside the body.
    first = max(errors, key=lambda error: len(error["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][1]}")
    if not isinstance(body, dict):
        return ApiError(400, "the body must be a JSON object, sent with the header 'content-type: application/json'")
    path = _path_in_body(first, body)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return ApiError(400, str(cause), ".".join([*path, cause.field] if cause.field else path))
    param = ".".join(path)
    if first["type"] == "missing":
        return ApiError(400, f"{param} is required", param)
    limits = [_limit(error) for error in errors if _path_in_body(error, body) == path]
    # A limit on the size or the form comes from the alternative whose type fits.
    limit = next((limit for limit in limits if limit.startswith(("have ", "match "))), None)
    if limit is None:
        limit = "be " + " or ".join(dict.fromkeys(limit.removeprefix("be ") for limit in limits))
    return ApiError(400, f"{param} should {limit}, got {_shown(first['input'])}", param)


def _limit(error: dict[str, Any]) -> str:
    """What pydantic says after "should", in JSON's words."""
    limit: str = error["msg"].partition("should ")[2]
    return limit.replace("a valid dictionary or object to extract fields from", "a valid object").replace(
        "a valid dictionary", "a valid object"
    )


def _path_in_body(error: dict[str, Any], body: Any) -> list[str]:
    """Where in the body an error is: pydantic's location, without the alternatives it names that were tried."""
    missing = [str(error["loc"][-1])] if error["type"] == "missing" else []
    path = []
    for step in error["loc"][1 : -1 if missing else None]:
        if (isinstance(body, dict) and step in body) or (isinstance(body, list) and isinstance(step, int)):
            body = body[step]
            path.append(str(step))
    return path + missing


def _shown(value: Any) -> str:
    if isinstance(value, dict | list) and value:
        return "an object" if isinstance(value, dict) else "a list"
    text = orjson.dumps(value).decode()
    return text if len(text) <= _LONGEST_SHOWN_VALUE else text[:_LONGEST_SHOWN_VALUE] + "…"


async def _on_error(request: Request, error: Exception) -> Response:
    return api_error(error).response()


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_error(error.errors(), error.body).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Routing errors: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    response = api_error(error).response()
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; 499 is how access logs name this case


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnectedError, _on_disconnect)
    for kind in (ApiError, RequestError, OverloadedError, EngineDeadError, GenerationFailedError, Exception):
        app.add_exception_handler(kind, _on_error)
