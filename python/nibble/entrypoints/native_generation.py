"""What `/generate` does, for HTTP and for programs alike."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import asdict
from typing import Any

from nibble.entrypoints.choices import (
    Choice,
    GenerationOptions,
    check_num_generations,
    choices_of_prompt,
    resolve_max_new_tokens,
)
from nibble.entrypoints.context import ServerContext
from nibble.entrypoints.logprobs import native_logprob, native_logprobs
from nibble.entrypoints.native_protocol import GenerateRequest, NativeSampling
from nibble.generation import GenerationOutput, TokenLogprob
from nibble.observability.request_context import current_request, unique_request_id
from nibble.tokenizer.stop_regex import MAX_DIFFERENT
from nibble.utils.errors import RequestError

DEFAULT_MAX_NEW_TOKENS = 128


class NativeGeneration:
    """Runs one validated `/generate` request; its snapshots are the dicts that SGLang's clients read."""

    def __init__(self, body: GenerateRequest, context: ServerContext) -> None:
        self._body = body
        self._context = context
        self._received_at = time.monotonic()

    async def choices(self) -> list[Choice]:
        """The generations to run, `n` for each prompt."""
        body, engine = self._body, self._context.engine
        prompts = body.prompts()
        params = [body.sampling_of(index) for index in range(len(prompts))]
        check_num_generations(sum(max(param.n, 1) for param in params))
        if len({tuple(param.stop_regex) for param in params}) > MAX_DIFFERENT:
            raise RequestError(
                f"sampling_params may set stop_regex in at most {MAX_DIFFERENT} different ways; send several requests",
                "sampling_params.stop_regex",
            )
        options = GenerationOptions(
            body.data_parallel_rank,
            body.return_logprob,
            body.top_logprobs_num,
            body.priority,
            tuple(body.token_ids_logprob),
            body.logprob_start_len if body.return_logprob and body.logprob_start_len >= 0 else None,
        )
        shared_id = body.rid if isinstance(body.rid, str) else unique_request_id()
        context = current_request.get()
        if isinstance(body.rid, str) and context is not None:
            context.use_rid(body.rid)
        field = "text" if body.input_ids is None else "input_ids"
        choices: list[Choice] = []
        encoded = await self._context.prompts.encode(prompts, field)
        for index, (input_ids, param) in enumerate(zip(encoded, params, strict=True)):
            if isinstance(body.rid, list):
                client_id = prompt_id = body.rid[index]
            else:
                client_id, prompt_id = shared_id, f"{shared_id}-{index}" if len(prompts) > 1 else shared_id
            with _named_as_sent(f".{index}" if isinstance(body.sampling_params, list) else ""):
                limit = resolve_max_new_tokens(
                    param.max_new_tokens,
                    DEFAULT_MAX_NEW_TOKENS,
                    len(input_ids),
                    engine.context_length,
                    "max_new_tokens",
                    field,
                )
                sampling = param.sampling_params(limit)
                choices += choices_of_prompt(engine, client_id, prompt_id, input_ids, sampling, options, field)
            await asyncio.sleep(0)  # others run: each prompt may have stop_regex of its own to compile
        return choices

    def _is_list(self, choices: Sequence[Choice]) -> bool:
        return self._body.is_batch or len(choices) > 1

    async def response(self, choices: Sequence[Choice]) -> dict[str, Any] | list[dict[str, Any]]:
        """The whole response."""
        outputs = await self._context.running.collect(choices)
        formatted = [_NativeOutput(self._body, self._context, self._received_at).format(output) for output in outputs]
        return formatted if self._is_list(choices) else formatted[0]

    async def snapshots(self, choices: Sequence[Choice]) -> AsyncGenerator[dict[str, Any], None]:
        """Everything generated so far, again and again; in a list each says which `index` it is of."""
        outputs = [_NativeOutput(self._body, self._context, self._received_at) for _ in choices]
        async with aclosing(self._context.running.stream(choices)) as stream:
            async for i, output in stream:
                content = outputs[i].format(output)
                yield {**content, "index": i} if self._is_list(choices) else content


@contextmanager
def _named_as_sent(index: str) -> Iterator[None]:
    """A RequestError that names a sampling parameter says that it is one of `sampling_params`."""
    try:
        yield
    except RequestError as error:
        if error.field not in NativeSampling.model_fields:
            raise
        parent, message = f"sampling_params{index}.", str(error)
        named = parent + message if message.startswith(error.field) else message
        raise RequestError(named, parent + error.field) from None


class _NativeOutput:
    """Formats the snapshots of one generation; what is cumulative is only extended."""

    def __init__(self, body: GenerateRequest, context: ServerContext, received_at: float) -> None:
        self._body = body
        self._tokenizer = context.engine.tokenizer if body.return_text_in_logprobs else None
        self._received_at = received_at
        self._num_formatted = 0
        self._logprobs: dict[str, list[Any]] = {}

    def format(self, output: GenerationOutput) -> dict[str, Any]:
        reason = output.finish_reason
        meta_info: dict[str, Any] = {
            "id": output.request_id,
            "finish_reason": None,
            "prompt_tokens": output.prompt_tokens,
            "completion_tokens": output.completion_tokens,
            "cached_tokens": output.cached_tokens,
            "dp_rank": output.dp_rank,
            "e2e_latency": time.monotonic() - self._received_at,
        }
        if reason is not None:
            meta_info["finish_reason"] = {name: value for name, value in asdict(reason).items() if value is not None}
        if self._body.return_logprob:
            self._add_logprobs(output)
            meta_info |= self._logprobs
        return {"text": output.text, "output_ids": output.output_ids, "meta_info": meta_info}

    def _add_logprobs(self, output: GenerationOutput) -> None:
        if not self._logprobs:
            prompt = output.prompt_logprobs
            self._logprobs = self._format("input", () if prompt is None else prompt.logprobs)
            if prompt is not None:
                self._logprobs["input_token_logprobs"].insert(
                    0, native_logprob(self._tokenizer, None, prompt.first_token_id)
                )
                for name in self._logprobs.keys() - {"input_token_logprobs"}:
                    self._logprobs[name].insert(0, None)
            self._logprobs |= self._format("output", ())
        new = (output.logprobs or ())[self._num_formatted :]
        for name, values in self._format("output", new).items():
            self._logprobs[name] += values
        self._num_formatted += len(new)

    def _format(self, side: str, logprobs: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        """What `meta_info` says of tokens of the input or the output."""
        fields: dict[str, list[Any]] = {
            f"{side}_token_logprobs": [
                native_logprob(self._tokenizer, entry.logprob, entry.token_id) for entry in logprobs
            ]
        }
        if self._body.top_logprobs_num:
            fields[f"{side}_top_logprobs"] = [native_logprobs(self._tokenizer, entry.top) for entry in logprobs]
        if self._body.token_ids_logprob:
            fields[f"{side}_token_ids_logprobs"] = [native_logprobs(self._tokenizer, entry.named) for entry in logprobs]
        return fields
