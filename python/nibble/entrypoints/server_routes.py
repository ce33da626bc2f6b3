"""Routes about the server itself."""

import asyncio
import uuid
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from nibble.entrypoints.context import ServerContext, context_of
from nibble.entrypoints.errors import ApiError
from nibble.entrypoints.streaming import answers_with, json_response, while_connected
from nibble.generation import GenerationRequest
from nibble.sampling_params import SamplingParams

HEALTH_TIMEOUT_S = 20.0

router = APIRouter(tags=["server"])


@router.get("/health")
async def health(request: Request) -> Response:
    """Whether the processes are alive; asks nothing of them."""
    engine = context_of(request).engine
    if engine.state() == "dead":
        raise ApiError(503, "the engine is dead", code="engine_dead")
    return json_response({"status": engine.state()})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """Whether requests are accepted now."""
    _check_ready(context_of(request))
    return json_response({"status": "ready"})


@router.get("/health_generate")
async def health_generate(request: Request) -> Response:
    """Whether one token can be generated, in a limited time."""
    context = context_of(request)
    _check_ready(context)
    try:
        await while_connected(request.receive, asyncio.wait_for(_generate_one_token(context), HEALTH_TIMEOUT_S))
    except TimeoutError:
        raise ApiError(503, f"no token was generated within {HEALTH_TIMEOUT_S:g} s", code="unhealthy") from None
    return json_response({"status": "ready"})


@router.get("/model_info")
@router.get("/get_model_info", include_in_schema=False)
async def model_info(request: Request) -> Response:
    return json_response(context_of(request).engine.model_info())


@router.get("/server_info")
@router.get("/get_server_info", include_in_schema=False)
async def server_info(request: Request) -> Response:
    return json_response(context_of(request).engine.server_info())


@router.get("/flush_cache", response_class=Response, responses=answers_with("text/plain"))
@router.post("/flush_cache", response_class=Response, responses=answers_with("text/plain"))
async def flush_cache(request: Request) -> Response:
    """Forgets the prefix caches of all ranks; a 400 while requests run or wait."""
    context = context_of(request)
    _check_ready(context)
    context.engine.flush_cache()
    return PlainTextResponse("The prefix cache is flushed.\n")


def _check_ready(context: ServerContext) -> None:
    if not context.engine.is_ready():
        state = context.engine.state()
        raise ApiError(
            503, f"the engine is not ready: {state}", code="engine_dead" if state == "dead" else "overloaded"
        )


async def _generate_one_token(context: ServerContext) -> None:
    request = GenerationRequest(
        request_id=f"health-{uuid.uuid4().hex}",
        input_ids=[0],
        sampling=SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True),
    )
    async with aclosing(context.engine.generate(request)) as outputs:
        async for output in outputs:
            if output.finish_reason is not None and output.finish_reason.type == "abort":
                raise ApiError(503, output.finish_reason.message or "the generation was aborted", code="unhealthy")
