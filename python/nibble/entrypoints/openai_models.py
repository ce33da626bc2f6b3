"""`/v1/models`."""

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from nibble.entrypoints.context import context_of
from nibble.entrypoints.engine_protocol import EngineClient
from nibble.entrypoints.errors import ApiError
from nibble.entrypoints.streaming import json_response

router = APIRouter(tags=["OpenAI"])

_STARTED_AT = int(time.time())


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The one model that is served, whatever name requests call it."""
    return json_response({"object": "list", "data": [_model(context_of(request).engine)]})


@router.get("/v1/models/{model_id:path}")
async def get_model(model_id: str, request: Request) -> Response:
    engine = context_of(request).engine
    if model_id != engine.served_model_name:
        message = f"there is no model {model_id[:256]!r}; this server has {engine.served_model_name!r}"
        raise ApiError(404, message, "model", "model_not_found")
    return json_response(_model(engine))


def _model(engine: EngineClient) -> dict[str, Any]:
    return {
        "id": engine.served_model_name,
        "object": "model",
        "created": _STARTED_AT,
        "owned_by": "nibble",
        "max_model_len": engine.context_length,
    }
