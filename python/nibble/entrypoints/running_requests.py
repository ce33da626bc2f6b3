"""The generations that requests are waiting for: several of them run at once, and any can be aborted."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace

from nibble.entrypoints.choices import Choice
from nibble.entrypoints.engine_protocol import EngineClient
from nibble.entrypoints.errors import GenerationFailedError
from nibble.generation import GenerationOutput
from nibble.observability.generation_life import GenerationObserver, follow_generations
from nibble.utils.errors import RequestError

_RARE_UPDATES = 64
"""Tokens. An aborted generation may miss as many of its last ones."""

OutputGenerator = AsyncGenerator[GenerationOutput, None]


@dataclass
class _Running:
    generation_ids: list[str] = field(default_factory=list)
    aborted: bool = False


class RunningRequests:
    """What is being generated, by client id."""

    def __init__(self, engine: EngineClient, observers: Sequence[GenerationObserver] = ()) -> None:
        """Every generation is told to the `observers`."""
        self._engine = engine
        self._observers = observers
        self._running: dict[str, _Running] = {}

    def abort_all(self) -> bool:
        """Aborts every generation; false when there is none."""
        client_ids = list(self._running)
        for client_id in client_ids:
            self.abort(client_id)
        return bool(client_ids)

    def abort(self, client_id: str) -> bool:
        """Aborts the generations of one id; false when there is none (any more)."""
        running = self._running.get(client_id)
        if running is None:
            return False
        running.aborted = True
        for generation_id in running.generation_ids:
            self._engine.abort(generation_id)
        return True

    async def collect(self, choices: Sequence[Choice]) -> list[GenerationOutput]:
        """The finished outputs of all choices, in order."""
        outputs: dict[int, GenerationOutput] = {}
        async with aclosing(self.stream([_reporting_rarely(choice) for choice in choices])) as stream:
            async for index, output in stream:
                outputs[index] = output
        return [outputs[index] for index in range(len(choices))]

    async def stream(self, choices: Sequence[Choice]) -> AsyncGenerator[tuple[int, GenerationOutput], None]:
        """Runs all choices at once and yields their snapshots as they come, each with its choice's index.

        Closing the generator aborts what still runs. Raises GenerationFailedError when the engine aborts a choice
        that no client asked to abort.
        """
        generations = [choice.generation for choice in choices]
        with self._track(choices) as running, follow_generations(generations, self._observers) as lives:
            outputs = [self._engine.generate(generation) for generation in generations]
            async with aclosing(_interleave(outputs)) as interleaved:
                async for index, output in interleaved:
                    reason = output.finish_reason
                    if reason is not None and reason.type == "abort" and not running[choices[index].client_id].aborted:
                        raise GenerationFailedError(reason.message or "the engine aborted the generation")
                    lives[index].advance(output)
                    yield index, output

    @contextmanager
    def _track(self, choices: Sequence[Choice]) -> Iterator[dict[str, _Running]]:
        """Makes the choices known to `abort`. Raises RequestError for an id that is in use."""
        tracked: dict[str, _Running] = {}
        for choice in choices:
            if choice.client_id in self._running:
                raise RequestError(f"a request with rid {choice.client_id!r} is already running", "rid")
            tracked.setdefault(choice.client_id, _Running()).generation_ids.append(choice.generation.request_id)
        self._running |= tracked
        try:
            yield tracked
        finally:
            for client_id in tracked:
                del self._running[client_id]


def _reporting_rarely(choice: Choice) -> Choice:
    """For a client that sees no snapshot but the last. Stop strings are found in the snapshots, so they need all."""
    if choice.generation.sampling.stop or choice.generation.sampling.stop_regex:
        return choice
    return replace(choice, generation=replace(choice.generation, update_interval=_RARE_UPDATES))


async def _interleave(streams: Sequence[OutputGenerator]) -> AsyncGenerator[tuple[int, GenerationOutput], None]:
    """Merges the streams. Of snapshots that a slow consumer leaves waiting, only the latest of each is kept."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for output in stream:
                yield 0, output
        return

    latest: dict[int, GenerationOutput] = {}
    failures: list[Exception] = []
    unfinished = len(streams)
    changed = asyncio.Event()

    async def pump(index: int, stream: OutputGenerator) -> None:
        nonlocal unfinished
        try:
            async with aclosing(stream):
                async for output in stream:
                    latest[index] = output
                    changed.set()
        except Exception as error:
            failures.append(error)
        finally:
            unfinished -= 1
            changed.set()

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        while unfinished or latest or failures:
            await changed.wait()
            changed.clear()
            if failures:
                raise failures[0]
            waiting = list(latest.items())
            latest.clear()
            for item in waiting:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
