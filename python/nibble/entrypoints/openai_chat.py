"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response

from nibble.entrypoints.choices import Choice, GenerationOptions, choices_of_prompt, resolve_max_new_tokens
from nibble.entrypoints.context import ServerContext, context_of
from nibble.entrypoints.json_route import JsonRoute
from nibble.entrypoints.logprobs import chat_logprobs
from nibble.entrypoints.openai_protocol import ChatCompletionRequest
from nibble.entrypoints.openai_response import Delta, finish_fields, response_head, usage
from nibble.entrypoints.streaming import (
    DONE_EVENT,
    EventGenerator,
    event_stream,
    json_event,
    json_response,
    while_connected,
)
from nibble.generation import FinishReason, GenerationOutput, TokenLogprob

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """Continues a conversation as the assistant."""
    completion = _ChatCompletion(body, context_of(request))
    choices = await completion.choices()
    if body.stream:
        return await event_stream(request, completion.events(choices))
    return json_response(await while_connected(request.receive, completion.response(choices)))


class _ChatCompletion:
    def __init__(self, body: ChatCompletionRequest, context: ServerContext) -> None:
        self._body = body
        self._context = context
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = response_head("chatcmpl", kind, context.engine.served_model_name)

    async def choices(self) -> list[Choice]:
        """The generations to run, `n` for the conversation."""
        body, engine = self._body, self._context.engine
        messages = [message.for_template() for message in body.messages]
        input_ids = await self._context.prompts.encode_chat(messages, body.chat_template_kwargs)
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        requested = getattr(body, field)
        sampling = body.sampling_params(
            resolve_max_new_tokens(requested, None, len(input_ids), engine.context_length, field)
        )
        options = GenerationOptions(body.data_parallel_rank, body.logprobs, body.top_logprobs, body.priority)
        completion_id: str = self._head["id"]
        return choices_of_prompt(engine, completion_id, completion_id, input_ids, sampling, options, "messages")

    async def response(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole response."""
        outputs = await self._context.running.collect(choices)
        formatted = [
            {
                "index": i,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": self._logprobs(output.logprobs or ()),
                **finish_fields(output.finish_reason),
            }
            for i, output in enumerate(outputs)
        ]
        return {**self._head, "choices": formatted, "usage": usage(outputs, len(choices))}

    async def events(self, choices: Sequence[Choice]) -> EventGenerator:
        """The response as server-sent events: for each choice its role, its text in deltas, and why it ended."""
        deltas = [Delta() for _ in choices]
        outputs: dict[int, GenerationOutput] = {}
        async with aclosing(self._context.running.stream(choices)) as stream:
            async for i, output in stream:
                if i not in outputs:
                    yield self._chunk(i, {"role": "assistant", "content": ""})
                outputs[i] = output
                text, logprobs = deltas[i].advance(output)
                if text or logprobs:
                    yield self._chunk(i, {"content": text}, logprobs)
                if output.finish_reason is not None:
                    yield self._chunk(i, {}, finish_reason=output.finish_reason)
        if self._body.stream_options.include_usage:
            counts = usage([outputs[i] for i in range(len(choices))], len(choices))
            yield json_event({**self._head, "choices": [], "usage": counts})
        yield DONE_EVENT

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: Sequence[TokenLogprob] = (),
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            **finish_fields(finish_reason),
        }
        chunk = {**self._head, "choices": [choice]}
        if self._body.stream_options.include_usage:
            chunk["usage"] = None
        return json_event(chunk)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(self._context.engine.tokenizer, logprobs) if self._body.logprobs else None
