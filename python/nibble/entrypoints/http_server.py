"""The HTTP application: OpenAI's and SGLang's routes over one engine."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from nibble.entrypoints import (
    native_routes,
    openai_chat,
    openai_completions,
    openai_models,
    playground_route,
    profile_routes,
    server_routes,
)
from nibble.entrypoints.api_key import ApiKeyMiddleware
from nibble.entrypoints.chat_answer import ChatFormats
from nibble.entrypoints.context import ServerContext
from nibble.entrypoints.engine_protocol import EngineClient
from nibble.entrypoints.errors import ErrorResponse, install_error_handlers
from nibble.entrypoints.http_protocol import HeadLimitMiddleware
from nibble.entrypoints.metrics_route import metrics_router
from nibble.entrypoints.prompts import PromptEncoder
from nibble.entrypoints.reasoning import REASONING_FORMATS
from nibble.entrypoints.request_tracking import RequestTrackingMiddleware
from nibble.entrypoints.running_requests import RunningRequests
from nibble.entrypoints.tools.formats import TOOL_CALL_FORMATS
from nibble.observability.generation_life import GenerationObserver
from nibble.observability.metrics import EngineMetrics
from nibble.observability.request_log import RequestLog

MAX_REQUEST_BYTES = 16 * 2**20


def create_app(
    engine: EngineClient,
    *,
    api_key: str | None = None,
    admin_api_key: str | None = None,
    max_request_bytes: int = MAX_REQUEST_BYTES,
    metrics: EngineMetrics | None = None,
    log_requests_level: int | None = None,
    tool_call_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> FastAPI:
    """The app. For the keys see `ApiKeyMiddleware`.

    With `metrics` there is a route `/metrics`; with `log_requests_level`, 0 to 3, requests are logged.
    The parsers are names of `TOOL_CALL_FORMATS` and `REASONING_FORMATS`.
    """
    prompts = PromptEncoder(engine.tokenizer)
    request_log = None
    if log_requests_level is not None:
        request_log = RequestLog(log_requests_level, lambda ids: engine.tokenizer.decode(ids, False))
    observers: list[GenerationObserver] = [observer for observer in (metrics, request_log) if observer is not None]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        prompts.close()

    app = FastAPI(
        title="Nibble",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses={
            "4XX": {"model": ErrorResponse, "description": "What is wrong with the request"},
            "5XX": {"model": ErrorResponse, "description": "Why the server can't answer now, or failed"},
        },
    )
    app.state.context = ServerContext(
        engine,
        prompts,
        RunningRequests(engine, observers),
        ChatFormats(
            None if tool_call_parser is None else TOOL_CALL_FORMATS[tool_call_parser],
            None if reasoning_parser is None else REASONING_FORMATS[reasoning_parser],
        ),
    )
    app.state.max_request_bytes = max_request_bytes
    install_error_handlers(app)
    for module in (
        openai_models,
        openai_completions,
        openai_chat,
        native_routes,
        server_routes,
        profile_routes,
        playground_route,
    ):
        app.include_router(module.router)
    if metrics is not None:
        app.include_router(metrics_router(metrics))
    app.add_middleware(ApiKeyMiddleware, api_key=api_key, admin_api_key=admin_api_key)
    app.add_middleware(HeadLimitMiddleware)
    app.add_middleware(RequestTrackingMiddleware, metrics=metrics, request_log=request_log)  # outermost
    return app
