"""PyTorch's profiler on every rank, started and stopped by request."""

import time
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from nibble.entrypoints.context import context_of
from nibble.entrypoints.json_route import JsonRoute
from nibble.entrypoints.request_model import RequestModel
from nibble.entrypoints.streaming import json_response
from nibble.ipc.messages import StartProfile

router = APIRouter(route_class=JsonRoute, tags=["server"])


class StartProfileRequest(RequestModel):
    """`POST /start_profile`, which may have no body."""

    output_dir: str = Field(default=".", max_length=1024, description="A folder inside --profiler-dir.")
    num_steps: int | None = Field(default=None, ge=1, description="Stop by itself after so many steps.")
    activities: list[Literal["CPU", "GPU"]] = Field(default=["CPU"], min_length=1, max_length=2)
    with_stack: bool = Field(default=False, description="Record the Python stack of every operation.")
    record_shapes: bool = False
    profile_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = Field(
        default=None, description="What the files' names begin with. Default: the time."
    )


@router.post("/start_profile")
async def start_profile(request: Request, body: StartProfileRequest | None = None) -> Response:
    """Records what every rank does, from its next step on. A profile that is being recorded is given up."""
    body = body or StartProfileRequest()
    name = body.profile_id or str(int(time.time()))
    activities = tuple(body.activities)
    context_of(request).engine.start_profile(
        StartProfile(body.output_dir, name, body.num_steps, activities, body.with_stack, body.record_shapes)
    )
    return json_response({"profile_id": name})


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    """Writes one trace a rank, for Perfetto or chrome://tracing. The engine stands still meanwhile."""
    return json_response({"traces": await context_of(request).engine.stop_profile()})
