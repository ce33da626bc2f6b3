"""`POST /v1/chat/completions`."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from nibble.entrypoints.chat_answer import (
    AnswerDelta,
    ChatAnswerFormat,
    ChatAnswerParser,
    merged_tool_calls,
    tool_call_fields,
)
from nibble.entrypoints.choices import Choice, GenerationOptions, choices_of_prompt, resolve_max_new_tokens
from nibble.entrypoints.context import ServerContext, context_of
from nibble.entrypoints.json_route import JsonRoute
from nibble.entrypoints.logprobs import chat_logprobs
from nibble.entrypoints.openai_protocol import ChatCompletionRequest
from nibble.entrypoints.openai_response import Delta, finish_fields, response_head, usage
from nibble.entrypoints.reasoning import Start
from nibble.entrypoints.streaming import (
    DONE_EVENT,
    EventGenerator,
    answers_with,
    event_stream,
    json_event,
    json_response,
    while_connected,
)
from nibble.generation import FinishReason, GenerationOutput, TokenLogprob

_PROMPT_END = 16
"""Tokens of the prompt that are looked at for how the answer begins."""

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post("/v1/chat/completions", responses=answers_with("text/event-stream"))
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
        self._format = ChatAnswerFormat(body, context.chat_formats)
        self._start: Start = "answering"
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        self._head = response_head("chatcmpl", kind, context.engine.served_model_name)

    async def choices(self) -> list[Choice]:
        """The generations to run, `n` for the conversation."""
        body, engine = self._body, self._context.engine
        messages = [message.for_template() for message in body.messages]
        tools = [tool.for_template() for tool in body.usable_tools]
        input_ids = await self._context.prompts.encode_chat(messages, body.chat_template_kwargs, tools)
        self._start = self._format.start(engine.tokenizer.decode(input_ids[-_PROMPT_END:], skip_special_tokens=False))
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        requested = getattr(body, field)
        sampling = body.sampling_params(
            resolve_max_new_tokens(requested, None, len(input_ids), engine.context_length, field, "messages")
        )
        sampling = msgspec.structs.replace(
            sampling,
            grammar=self._format.grammar(self._start),
            skip_special_tokens=sampling.skip_special_tokens
            and not self._format.needs_special_tokens(engine.tokenizer),
        )
        options = GenerationOptions(body.data_parallel_rank, body.logprobs, body.top_logprobs, body.priority)
        completion_id: str = self._head["id"]
        return choices_of_prompt(engine, completion_id, completion_id, input_ids, sampling, options, "messages")

    async def response(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole response."""
        outputs = await self._context.running.collect(choices)
        return {
            **self._head,
            "choices": [self._choice(i, output) for i, output in enumerate(outputs)],
            "usage": usage(outputs, len(choices)),
        }

    def _choice(self, index: int, output: GenerationOutput) -> dict[str, Any]:
        parser = self._format.parser(self._start)
        answer = parser.push(output.text, is_last=True)
        message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = merged_tool_calls(answer.calls)
        if not answer.content and (answer.reasoning or answer.calls):
            message["content"] = None
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(output.logprobs or ()),
            **_finish_fields(output.finish_reason, parser),
        }

    async def events(self, choices: Sequence[Choice]) -> EventGenerator:
        """The response as server-sent events: for each choice its role, what it says in deltas, and why it ended."""
        deltas = [Delta() for _ in choices]
        parsers = [self._format.parser(self._start) for _ in choices]
        outputs: dict[int, GenerationOutput] = {}
        async with aclosing(self._context.running.stream(choices)) as stream:
            async for i, output in stream:
                if i not in outputs:
                    yield self._chunk(i, {"role": "assistant", "content": ""})
                outputs[i] = output
                text, logprobs = deltas[i].advance(output)
                answer = parsers[i].push(text, is_last=output.finish_reason is not None)
                for part in _parts(answer) or ([{"content": ""}] if logprobs else []):
                    yield self._chunk(i, part, logprobs)
                    logprobs = ()
                if output.finish_reason is not None:
                    yield self._chunk(i, {}, finish=_finish_fields(output.finish_reason, parsers[i]))
        if self._body.stream_options.include_usage:
            counts = usage([outputs[i] for i in range(len(choices))], len(choices))
            yield json_event({**self._head, "choices": [], "usage": counts})
        yield DONE_EVENT

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[TokenLogprob] = (),
        finish: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            **(finish or finish_fields(None)),
        }
        chunk = {**self._head, "choices": [choice]}
        if self._body.stream_options.include_usage:
            chunk["usage"] = None
        return json_event(chunk)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return chat_logprobs(self._context.engine.tokenizer, logprobs) if self._body.logprobs else None


def _parts(answer: AnswerDelta) -> list[dict[str, Any]]:
    """The deltas of a stream that say it."""
    parts: list[dict[str, Any]] = []
    if answer.reasoning:
        parts.append({"reasoning_content": answer.reasoning})
    if answer.content:
        parts.append({"content": answer.content})
    return parts + [{"tool_calls": [tool_call_fields(call)]} for call in answer.calls]


def _finish_fields(reason: FinishReason | None, parser: ChatAnswerParser) -> dict[str, Any]:
    fields = finish_fields(reason)
    return (
        fields | {"finish_reason": "tool_calls"} if fields["finish_reason"] == "stop" and parser.has_calls else fields
    )
