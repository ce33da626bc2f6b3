"""An engine without a model, that says what a test tells it to, and a client for the app over it."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import httpx
from starlette.types import Send

from nibble.entrypoints.engine_protocol import EngineState
from nibble.entrypoints.http_server import create_app
from nibble.generation import FinishReason, GenerationOutput, GenerationRequest, PromptLogprobs, TokenLogprob
from nibble.ipc.messages import StartProfile
from nibble.sampling_params import validate_sampling_params
from nibble.tokenizer.detokenizer import IncrementalDetokenizer
from nibble.utils.errors import EngineDeadError, OverloadedError, RequestError
from tiny_tokenizer import tiny_tokenizer

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi"},
    CHAT: {"messages": HELLO},
    "/generate": {"text": "Hi"},
}
"""The smallest request to each route that generates."""
REPLY = "Hello, 世界 😀! <div>it's 1234 o'clock</div>"


class FakeEngine:
    """Generates `reply(request)`, one token a snapshot, through the real detokenizer."""

    served_model_name = "tiny/model"
    context_length = 200
    dp_size = 2
    takes_priorities = True

    def __init__(self, reply: Callable[[GenerationRequest], list[int]] | str = REPLY) -> None:
        self.tokenizer = tiny_tokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self.requests: list[GenerationRequest] = []
        self.cut_short: list[str] = []
        """Requests whose generator was closed before they had finished."""
        self.num_flushes = 0
        self.profiles: list[StartProfile] = []
        self.current_state: EngineState = "ready"
        self.hang_after: int | None = None
        """Generate so many tokens, then nothing more."""
        self.fail_after: int | None = None
        """Generate so many tokens, then raise `failure`, or abort when that is a message."""
        self.failure: Exception | str = "the row became NaN"
        self.failing_suffix = ""
        """Only requests with ids that end like this fail."""
        self._aborted: dict[str, asyncio.Event] = {}
        self._reply = self._encoded(reply) if isinstance(reply, str) else reply

    def _encoded(self, reply: str) -> Callable[[GenerationRequest], list[int]]:
        return lambda request: [*self.tokenizer.encode(reply), *self.tokenizer.eos_token_ids]

    def is_ready(self) -> bool:
        return self.current_state == "ready"

    def state(self) -> EngineState:
        return self.current_state

    def model_info(self) -> dict[str, Any]:
        return {"model_path": "/models/tiny", "is_generation": True}

    def server_info(self) -> dict[str, Any]:
        return {"dp_size": self.dp_size, "api_key": "***"}

    def flush_cache(self) -> None:
        if self._aborted:
            raise RequestError(f"{len(self._aborted)} requests run or wait")
        self.num_flushes += 1

    def start_profile(self, profile: StartProfile) -> None:
        self.profiles.append(profile)

    async def stop_profile(self) -> list[str]:
        if not self.profiles:
            raise RequestError("no profile was started")
        return [f"{self.profiles.pop().name}.trace"]

    def abort(self, request_id: str) -> None:
        assert request_id, "an empty id must never reach the engine"
        if request_id in self._aborted:
            self._aborted[request_id].set()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        if self.current_state == "dead":
            raise EngineDeadError("a rank died")
        if self.current_state != "ready":
            raise OverloadedError("the server is draining")
        validate_sampling_params(request.sampling, self.vocab_size)
        self.requests.append(request)
        self._aborted[request.request_id] = asyncio.Event()
        finished = False
        try:
            async for output in self._snapshots(request):
                finished = output.finish_reason is not None
                yield output
        finally:
            del self._aborted[request.request_id]
            if not finished:
                self.cut_short.append(request.request_id)

    async def _snapshots(self, request: GenerationRequest) -> AsyncGenerator[GenerationOutput, None]:
        sampling = request.sampling
        detokenizer = IncrementalDetokenizer(
            self.tokenizer, sampling.stop, sampling.skip_special_tokens, sampling.stop_regex
        )
        tokens: list[int] = []
        output = GenerationOutput(
            request.request_id, "", [], len(request.input_ids), 3, request.data_parallel_rank or 0
        )
        if sampling.max_new_tokens == 0:
            prompt = self._prompt_logprobs(request)
            logprobs = () if request.return_logprob else None
            yield replace(
                output, finish_reason=FinishReason("length", length=0), logprobs=logprobs, prompt_logprobs=prompt
            )
            return
        for token in self._reply(request):
            await asyncio.sleep(0)
            if self.fail_after == len(tokens) and request.request_id.endswith(self.failing_suffix):
                if isinstance(self.failure, Exception):
                    raise self.failure
                yield replace(output, finish_reason=FinishReason("abort", message=self.failure))
                return
            if self.hang_after == len(tokens):
                await self._aborted[request.request_id].wait()
            if self._aborted[request.request_id].is_set():
                yield replace(output, finish_reason=FinishReason("abort", message="aborted by the client"))
                return
            tokens.append(token)
            reason = self._finish_reason(detokenizer.append([token]), tokens, request)
            if reason is not None:
                detokenizer.finish()
            output = replace(
                output,
                text=detokenizer.text,
                output_ids=list(tokens),
                finish_reason=reason,
                logprobs=tuple(self._logprob(token, request) for token in tokens) if request.return_logprob else None,
                prompt_logprobs=self._prompt_logprobs(request),
            )
            yield output
            if reason is not None:
                return

    def _finish_reason(self, matched: str | None, tokens: list[int], request: GenerationRequest) -> FinishReason | None:
        sampling = request.sampling
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.tokenizer.eos_token_ids)}
        if matched is not None:
            return FinishReason("stop", matched=matched)
        if tokens[-1] in ends:
            return FinishReason("stop", matched=tokens[-1])
        if len(tokens) == sampling.max_new_tokens:
            return FinishReason("length", length=len(tokens))
        return None

    def _logprob(self, token: int, request: GenerationRequest) -> TokenLogprob:
        top = [(-0.5, token), (float("-inf"), 0), *((-2.0 - i, 1 + i) for i in range(20))]
        named = tuple((-3.0, other) for other in request.token_ids_logprob)
        return TokenLogprob(-0.5, token, tuple(top[: request.top_logprobs_num]), named)

    def _prompt_logprobs(self, request: GenerationRequest) -> PromptLogprobs | None:
        if request.logprob_start_len is None:
            return None
        first, *others = request.input_ids[request.logprob_start_len :]
        return PromptLogprobs(first, tuple(self._logprob(token, request) for token in others))


def parrot(request: GenerationRequest) -> list[int]:
    """Generates the prompt once more, and the end of sequence."""
    return [*request.input_ids, *tiny_tokenizer().eos_token_ids]


class Api:
    """A synchronous client of an app over a fake engine."""

    def __init__(self, engine: FakeEngine | None = None, **options: Any) -> None:
        self.engine = engine or FakeEngine()
        self.app = create_app(self.engine, **options)
        self._loop = asyncio.Runner()

    def run(self, coroutine: Any) -> Any:
        return self._loop.run(coroutine)

    def http_client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            async with self.http_client() as client:
                return await client.request(method, path, **options)

        return self.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def result(self, path: str, body: Any) -> Any:
        """The answer to a request that must succeed."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def error(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        """The error of a request that must fail, in OpenAI's form."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        return error_of(response)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream that must succeed, without the final [DONE]."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        events = sse_events(response.text)
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]


def sse_events(text: str) -> list[str]:
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    return content["error"]


async def conversation(
    api: Api,
    path: str,
    body: dict[str, Any],
    sent: list[dict[str, Any]],
    leave: asyncio.Event | None = None,
    send: Send | None = None,
) -> None:
    """One request, spoken in ASGI; the client disconnects once `leave` is set."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "server": ("test", 80),
        "client": ("test", 1),
        "scheme": "http",
        "root_path": "",
    }
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await (leave or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def keep(message: Any) -> None:
        sent.append(message)

    await api.app(scope, receive, send or keep)
