"""Sees to it that every rank has compiled a request's grammar before it gets the request."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nibble.config.resolve import EngineConfig
from nibble.controller.grammar_trial import GrammarTrial
from nibble.ipc.messages import CompileGrammar, ForgetGrammar, GrammarCompiled, ToRank, vocabulary_path
from nibble.structured_output.grammar import Grammar
from nibble.utils.errors import OverloadedError, RequestError

MAX_COMPILED_BYTES = 64 * 2**20
"""Of one grammar, in each rank."""
MAX_KEPT_GRAMMARS = 64
MAX_KEPT_BYTES = 256 * 2**20
"""Of all grammars, in each rank."""

_Refusal = str | OverloadedError
"""What is wrong with a grammar, or with the server."""


@dataclass(eq=False)
class _Preparation:
    """Of one grammar."""

    structural_tag: str
    task: "asyncio.Task[_Refusal | None]" = field(init=False)
    num_waiting: int = 0
    """Requests."""
    has_begun: bool = False
    num_bytes: int = 0
    """When compiled."""


class Grammars:
    """A grammar is first compiled in a process of its own, which can be stopped when it takes too long or too much,
    and then, in the background, by each rank.

    They are compiled one after the other, those that nobody waits for any more not at all. What has been compiled is
    kept, least recently used forgotten first; what was refused stays refused.
    """

    def __init__(self, config: EngineConfig, run_dir: Path, send_to_all: Callable[[ToRank], None]) -> None:
        self._trial = GrammarTrial(config, vocabulary_path(run_dir))
        self._turn = asyncio.Lock()
        self._send_to_all = send_to_all
        self._num_ranks = config.parallel.world_size
        self._prepared: OrderedDict[str, _Preparation] = OrderedDict()
        """By key."""
        self._failure: Exception | None = None
        self._compiling: dict[str, tuple[set[int], asyncio.Future[str | None]]] = {}

    async def prepare(self, grammar: Grammar, given_up: asyncio.Future[None]) -> None:
        """Returns when a request with this grammar may be sent, as long as nothing is awaited before it is, or when
        the request is `given_up`.

        Raises RequestError, which names the grammar's field, for what is refused, OverloadedError when it could not be
        tried, or what `fail` was told.
        """
        while not given_up.done():
            preparation = self._prepared.get(grammar.key) or self._begin(grammar)
            self._prepared.move_to_end(grammar.key)
            await self._wait(grammar.key, preparation, given_up)
            if self._failure is not None:
                raise self._failure
            if not preparation.task.done():
                continue
            refusal = preparation.task.result()
            if isinstance(refusal, OverloadedError):
                raise refusal
            if refusal is not None:
                raise RequestError(f"{grammar.field} can't be used: {refusal}", grammar.field)
            if self._prepared.get(grammar.key) is preparation:  # it was not forgotten meanwhile
                return

    async def _wait(self, key: str, preparation: _Preparation, given_up: asyncio.Future[None]) -> None:
        preparation.num_waiting += 1
        try:
            either: set[asyncio.Future[Any]] = {preparation.task, given_up}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            preparation.num_waiting -= 1
            if not preparation.num_waiting and not preparation.has_begun:
                preparation.task.cancel()
                del self._prepared[key]

    def on_compiled(self, message: GrammarCompiled) -> None:
        """A rank has answered."""
        if message.key in self._compiling:
            waiting, outcome = self._compiling[message.key]
            waiting.discard(message.rank)
            if not outcome.done() and (message.error is not None or not waiting):
                outcome.set_result(message.error)

    def fail(self, error: Exception) -> None:
        """Nothing more can be compiled: whoever waits is told this error."""
        self._failure = error
        for _, outcome in self._compiling.values():
            if not outcome.done():
                outcome.set_result(None)
        self._trial.close()

    async def stop(self) -> None:
        """To be called after `fail`; returns when the process is gone."""
        await asyncio.gather(*(preparation.task for preparation in self._prepared.values()), return_exceptions=True)
        await self._trial.stop()

    def _begin(self, grammar: Grammar) -> _Preparation:
        preparation = _Preparation(grammar.structural_tag)
        preparation.task = asyncio.create_task(self._prepare(grammar.key, preparation))
        self._prepared[grammar.key] = preparation
        self._forget_oldest()
        return preparation

    def _forget_oldest(self) -> None:
        """Until what is kept and what is being compiled are within their limits together."""
        num_bytes = sum(preparation.num_bytes for preparation in self._prepared.values())
        for key, preparation in list(self._prepared.items()):
            if len(self._prepared) <= MAX_KEPT_GRAMMARS and num_bytes <= MAX_KEPT_BYTES:
                return
            if preparation.task.done():
                del self._prepared[key]
                num_bytes -= preparation.num_bytes
                self._send_to_all(ForgetGrammar(key))

    async def _prepare(self, key: str, preparation: _Preparation) -> _Refusal | None:
        async with self._turn:
            preparation.has_begun = True
            try:
                result = await self._trial.compile(preparation.structural_tag)
            except OverloadedError as error:
                del self._prepared[key]  # whoever asks again may have more luck
                return error
        if result.error is not None or self._failure is not None:  # once it has failed, no rank may ever answer
            return result.error
        if result.num_bytes > MAX_COMPILED_BYTES:
            return f"it takes {result.num_bytes} bytes when compiled, more than the limit of {MAX_COMPILED_BYTES}"
        preparation.num_bytes = result.num_bytes
        self._forget_oldest()
        outcome: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._compiling[key] = (set(range(self._num_ranks)), outcome)
        try:
            self._send_to_all(CompileGrammar(key, preparation.structural_tag))
            return await outcome
        finally:
            del self._compiling[key]
