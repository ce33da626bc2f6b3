"""SGLang's native routes that generate, and those of the tokenizer."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from nibble.entrypoints.choices import check_token_ids
from nibble.entrypoints.context import context_of
from nibble.entrypoints.json_route import JsonRoute
from nibble.entrypoints.native_generation import NativeGeneration
from nibble.entrypoints.native_protocol import AbortRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest
from nibble.entrypoints.request_model import is_prompt_list, prompt_list
from nibble.entrypoints.streaming import (
    DONE_EVENT,
    EventGenerator,
    answers_with,
    event_stream,
    json_event,
    json_response,
    while_connected,
)

router = APIRouter(route_class=JsonRoute, tags=["native"])


@router.post("/generate", responses=answers_with("text/event-stream"))
async def generate(body: GenerateRequest, request: Request) -> Response:
    """Continues one prompt or several; with several prompts or choices, the answer is a list."""
    generation = NativeGeneration(body, context_of(request))
    choices = await generation.choices()
    if body.stream:
        return await event_stream(request, _events(generation.snapshots(choices)))
    return json_response(await while_connected(request.receive, generation.response(choices)))


async def _events(snapshots: AsyncGenerator[dict[str, Any], None]) -> EventGenerator:
    async with aclosing(snapshots):
        async for snapshot in snapshots:
            yield json_event(snapshot)
    yield DONE_EVENT


@router.post("/abort_request")
async def abort_request(body: AbortRequest, request: Request) -> Response:
    """Aborts one request, or all. It is no error if it has ended already, which is always possible."""
    running = context_of(request).running
    return json_response({"aborted": running.abort_all() if body.abort_all else running.abort(body.rid)})


@router.post("/v1/tokenize")
@router.post("/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of one text or several."""
    context = context_of(request)
    tokens = await context.prompts.encode(prompt_list(body.prompt), "prompt", body.add_special_tokens)
    counts = [len(token_ids) for token_ids in tokens]
    several = is_prompt_list(body.prompt)
    return json_response(
        {
            "tokens": tokens if several else tokens[0],
            "count": counts if several else counts[0],
            "max_model_len": context.engine.context_length,
        }
    )


@router.post("/v1/detokenize")
@router.post("/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of one list of token ids or several."""
    context = context_of(request)
    token_lists = [token_ids for token_ids in prompt_list(body.tokens) if isinstance(token_ids, list)]
    for token_ids in filter(None, token_lists):
        check_token_ids(token_ids, context.engine.vocab_size, "tokens")
    texts = await context.prompts.decode(token_lists, body.skip_special_tokens)
    return json_response({"text": texts if is_prompt_list(body.tokens) else texts[0]})
