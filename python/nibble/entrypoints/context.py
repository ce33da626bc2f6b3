"""What the routes of one app share."""

from dataclasses import dataclass

from fastapi import Request

from nibble.entrypoints.chat_answer import ChatFormats
from nibble.entrypoints.engine_protocol import EngineClient
from nibble.entrypoints.prompts import PromptEncoder
from nibble.entrypoints.running_requests import RunningRequests


@dataclass(frozen=True)
class ServerContext:
    engine: EngineClient
    prompts: PromptEncoder
    running: RunningRequests
    chat_formats: ChatFormats


def context_of(request: Request) -> ServerContext:
    context = request.app.state.context
    assert isinstance(context, ServerContext)
    return context
