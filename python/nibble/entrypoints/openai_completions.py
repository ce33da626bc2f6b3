"""`POST /v1/completions`."""

from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from nibble.entrypoints.choices import (
    Choice,
    GenerationOptions,
    check_num_generations,
    choices_of_prompt,
    resolve_max_new_tokens,
)
from nibble.entrypoints.context import ServerContext, context_of
from nibble.entrypoints.json_route import JsonRoute
from nibble.entrypoints.logprobs import CompletionLogprobs
from nibble.entrypoints.openai_protocol import CompletionRequest
from nibble.entrypoints.openai_response import Delta, finish_fields, response_head, usage
from nibble.entrypoints.request_model import prompt_list
from nibble.entrypoints.streaming import (
    DONE_EVENT,
    EventGenerator,
    answers_with,
    event_stream,
    json_event,
    json_response,
    while_connected,
)
from nibble.generation import GenerationOutput, TokenLogprob

DEFAULT_MAX_TOKENS = 16

router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])


@router.post("/v1/completions", responses=answers_with("text/event-stream"))
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continues one prompt or several."""
    completion = _Completion(body, context_of(request))
    choices = await completion.choices()
    if body.stream:
        return await event_stream(request, completion.events(choices))
    return json_response(await while_connected(request.receive, completion.response(choices)))


class _Completion:
    def __init__(self, body: CompletionRequest, context: ServerContext) -> None:
        self._body = body
        self._context = context
        self._head = response_head("cmpl", "text_completion", context.engine.served_model_name)
        self._prompts = prompt_list(body.prompt)
        self._candidates = body.n if body.best_of is None else body.best_of
        """Generations for each prompt, of which the `n` likeliest are returned."""

    async def choices(self) -> list[Choice]:
        """The generations to run, all candidates for each prompt."""
        body, engine = self._body, self._context.engine
        check_num_generations(len(self._prompts) * self._candidates)
        options = GenerationOptions(
            body.data_parallel_rank,
            body.logprobs is not None or self._candidates > body.n,
            body.logprobs or 0,
            body.priority,
            logprob_start_len=0 if body.echo and body.logprobs is not None else None,
        )
        choices: list[Choice] = []
        for index, input_ids in enumerate(await self._context.prompts.encode(self._prompts, "prompt")):
            limit = resolve_max_new_tokens(
                body.max_tokens, DEFAULT_MAX_TOKENS, len(input_ids), engine.context_length, "max_tokens", "prompt"
            )
            sampling = msgspec.structs.replace(body.sampling_params(limit), n=self._candidates, grammar=body.grammar())
            completion_id: str = self._head["id"]
            prompt_id = completion_id if len(self._prompts) == 1 else f"{completion_id}-{index}"
            choices += choices_of_prompt(engine, completion_id, prompt_id, input_ids, sampling, options, "prompt")
        return choices

    def _echo(self, choice: int) -> str:
        """What the text of a choice begins with."""
        prompt = self._prompts[choice // self._body.n] if self._body.echo else ""
        if isinstance(prompt, str):
            return prompt
        return self._context.engine.tokenizer.decode(prompt, self._body.skip_special_tokens)

    async def response(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole response."""
        outputs = await self._context.running.collect(choices)
        formatted = [
            self._choice(i, self._echo(i) + output.text, self._logprobs(), output.logprobs or (), output)
            for i, output in enumerate(self._best(outputs))
        ]
        return {**self._head, "choices": formatted, "usage": usage(outputs, self._candidates)}

    def _best(self, outputs: Sequence[GenerationOutput]) -> list[GenerationOutput]:
        """Of each prompt's candidates the likeliest by token."""
        if self._candidates == self._body.n:
            return list(outputs)
        best: list[GenerationOutput] = []
        for first in range(0, len(outputs), self._candidates):
            candidates = outputs[first : first + self._candidates]
            best += sorted(candidates, key=_mean_logprob, reverse=True)[: self._body.n]
        return best

    async def events(self, choices: Sequence[Choice]) -> EventGenerator:
        """The response as server-sent events."""
        include_usage = self._body.stream_options.include_usage
        no_usage = {"usage": None} if include_usage else {}
        echoes = [self._echo(i) for i in range(len(choices))]
        deltas = [Delta() for _ in choices]
        logprobs = [self._logprobs() for _ in choices]
        outputs: dict[int, GenerationOutput] = {}
        async with aclosing(self._context.running.stream(choices)) as stream:
            async for i, output in stream:
                outputs[i] = output
                new_text, new_logprobs = deltas[i].advance(output)
                text, echoes[i] = echoes[i] + new_text, ""
                if text or new_logprobs or output.finish_reason is not None:
                    choice = self._choice(i, text, logprobs[i], new_logprobs, output)
                    yield json_event({**self._head, "choices": [choice], **no_usage})
        if include_usage:
            counts = usage([outputs[i] for i in range(len(choices))], self._body.n)
            yield json_event({**self._head, "choices": [], "usage": counts})
        yield DONE_EVENT

    def _logprobs(self) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        return CompletionLogprobs(self._context.engine.tokenizer, self._body.skip_special_tokens)

    def _choice(
        self,
        index: int,
        text: str,
        formatter: CompletionLogprobs | None,
        logprobs: Sequence[TokenLogprob],
        output: GenerationOutput,
    ) -> dict[str, Any]:
        formatted = None if formatter is None else formatter.format(logprobs, output.prompt_logprobs)
        return {"index": index, "text": text, "logprobs": formatted, **finish_fields(output.finish_reason)}


def _mean_logprob(output: GenerationOutput) -> float:
    logprobs = [entry.logprob for entry in output.logprobs or ()]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
