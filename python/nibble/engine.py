"""The engine without HTTP, for programs: `Engine(model_path=…).generate(…)`."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, Literal, Self, TypeVar, overload

from pydantic import ValidationError

from nibble.config.resolve import resolve
from nibble.config.server_args import ServerArgs
from nibble.controller.async_engine import AsyncEngine
from nibble.entrypoints.chat_answer import ChatFormats
from nibble.entrypoints.context import ServerContext
from nibble.entrypoints.errors import validation_error
from nibble.entrypoints.native_generation import NativeGeneration
from nibble.entrypoints.native_protocol import GenerateRequest
from nibble.entrypoints.prompts import PromptEncoder
from nibble.entrypoints.running_requests import RunningRequests
from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.errors import ConfigError, RequestError

T = TypeVar("T")
Output = dict[str, Any]
Snapshots = AsyncGenerator[Output, None]


class Engine:
    """Takes the fields of ServerArgs by name and starts the ranks; a context manager, or end it with `shutdown`.

    `generate` and `async_generate` take the fields of a `/generate` request and return its answers. The engine runs
    an event loop in a thread of its own, so it works in ordinary code and under any other event loop.
    """

    def __init__(self, **server_args: Any) -> None:
        """Returns when the engine is ready. Raises ConfigError or EngineDeadError with the reason."""
        self.config = resolve(ServerArgs(**server_args))
        if self.config.args.node_rank > 0:
            raise ConfigError("an Engine has node_rank=0; start the other nodes with python -m nibble.launch_server")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nibble engine", daemon=True)
        self._thread.start()
        try:
            self._engine, self._context = self._run(self._start())
        except BaseException:
            self._stop_loop()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    def server_info(self) -> dict[str, Any]:
        """Flags, what was resolved from them, and the state, as `/server_info` answers."""
        return self._engine.server_info()

    @overload
    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        stream: Literal[False] = False,
        **fields: Any,
    ) -> Any: ...
    @overload
    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        stream: Literal[True],
        **fields: Any,
    ) -> Iterator[Output]: ...
    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """Continues `prompt`, or `input_ids`; `fields` are those of `/generate` (return_logprob, rid, …).

        Returns a dict with `text`, `output_ids` and `meta_info`, a list of them for a list of prompts, or with
        `stream` an iterator of cumulative snapshots. Raises RequestError for what `/generate` answers with 400.
        """
        body = _request(text=prompt, sampling_params=sampling_params or {}, **fields)
        if stream:
            return self._stream(body)
        return self._run(self._generate(body))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """`generate` under the caller's event loop: awaits the answer; with `stream`, an async iterator."""
        body = _request(text=prompt, sampling_params=sampling_params or {}, **fields)
        if stream:
            return self._async_stream(body)
        return await asyncio.wrap_future(self._submit(self._generate(body)))

    def flush_cache(self) -> None:
        """Forgets all cached prefixes. Raises RequestError while requests run, as `/flush_cache` answers with 400."""
        self._run(self._flush_cache())

    def shutdown(self) -> None:
        """Ends all processes of the engine. May be called twice."""
        if self._thread.is_alive():
            self._run(self._engine.stop())
            self._context.prompts.close()
            self._stop_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    async def _start(self) -> tuple[AsyncEngine, ServerContext]:
        engine = AsyncEngine(self.config)
        try:
            await engine.start()
        except BaseException:
            await engine.stop()
            raise
        return engine, ServerContext(engine, PromptEncoder(engine.tokenizer), RunningRequests(engine), ChatFormats())

    async def _flush_cache(self) -> None:
        self._engine.flush_cache()

    async def _generate(self, body: GenerateRequest) -> Any:
        generation = NativeGeneration(body, self._context)
        return await generation.response(await generation.choices())

    async def _snapshots(self, body: GenerateRequest) -> Snapshots:
        generation = NativeGeneration(body, self._context)
        return generation.snapshots(await generation.choices())

    def _stream(self, body: GenerateRequest) -> Iterator[Output]:
        snapshots = self._run(self._snapshots(body))
        try:
            while (snapshot := self._run(_next(snapshots))) is not None:
                yield snapshot
        finally:
            self._run(_close(snapshots))

    async def _async_stream(self, body: GenerateRequest) -> Snapshots:
        snapshots = await asyncio.wrap_future(self._submit(self._snapshots(body)))
        try:
            while (snapshot := await asyncio.wrap_future(self._submit(_next(snapshots)))) is not None:
                yield snapshot
        finally:
            await asyncio.wrap_future(self._submit(_close(snapshots)))

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._submit(work).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _request(**fields: Any) -> GenerateRequest:
    try:
        return GenerateRequest.model_validate(fields)
    except ValidationError as error:
        errors = [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors()]  # as FastAPI reports them
        refusal = validation_error(errors, fields)
        raise RequestError(refusal.message, refusal.param) from None


async def _next(snapshots: Snapshots) -> Output | None:
    return await anext(snapshots, None)


async def _close(snapshots: Snapshots) -> None:
    await snapshots.aclose()
