"""Sees to it that every rank has compiled a request's grammar before it gets the request."""

import asyncio
import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from nibble.config.resolve import EngineConfig
from nibble.controller.grammar_trial_process import TrialGrammar, TrialResult, TrialSetup
from nibble.ipc.messages import CompileGrammar, ForgetGrammar, GrammarCompiled, ToRank, vocabulary_path
from nibble.structured_output.grammar import Grammar
from nibble.utils.errors import RequestError

COMPILE_TIMEOUT_S = 10.0
MAX_COMPILED_BYTES = 64 * 2**20
"""Of one grammar, in each rank."""
MAX_KEPT_GRAMMARS = 64
_START_TIMEOUT_S = 120.0
_LINE_LIMIT = 2**20


class Grammars:
    """A grammar is first compiled in a process of its own, which can be stopped when it takes too long or too much,
    and then, in the background, by each rank.

    What has been compiled is kept, least recently used forgotten first; what was refused stays refused.
    """

    def __init__(self, config: EngineConfig, run_dir: Path, send_to_all: Callable[[ToRank], None]) -> None:
        self._trial = _Trial(config, vocabulary_path(run_dir))
        self._send_to_all = send_to_all
        self._num_ranks = config.parallel.world_size
        self._prepared: OrderedDict[str, asyncio.Task[str | None]] = OrderedDict()
        """By key: why the grammar is refused, or None."""
        self._failure: Exception | None = None
        self._compiling: dict[str, tuple[set[int], asyncio.Future[str | None]]] = {}

    async def prepare(self, grammar: Grammar) -> None:
        """Returns when a request with this grammar may be sent, as long as nothing is awaited before it is.

        Raises RequestError, which names the grammar's field, for what is refused, or what `fail` was told.
        """
        key = grammar.key
        while True:
            task = self._prepared.get(key) or self._begin(grammar)
            self._prepared.move_to_end(key)
            refusal = await asyncio.shield(task)
            if self._failure is not None:
                raise self._failure
            if refusal is not None:
                raise RequestError(f"{grammar.field} can't be used: {refusal}", grammar.field)
            if self._prepared.get(key) is task:  # it was not forgotten meanwhile
                return

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
        await asyncio.gather(*self._prepared.values(), return_exceptions=True)
        await self._trial.stop()

    def _begin(self, grammar: Grammar) -> asyncio.Task[str | None]:
        if len(self._prepared) >= MAX_KEPT_GRAMMARS:
            oldest = next((key for key, task in self._prepared.items() if task.done()), None)
            if oldest is not None:
                del self._prepared[oldest]
                self._send_to_all(ForgetGrammar(oldest))
        task = asyncio.create_task(self._prepare(grammar.structural_tag, grammar.key))
        self._prepared[grammar.key] = task
        return task

    async def _prepare(self, structural_tag: str, key: str) -> str | None:
        result = await self._trial.compile(structural_tag)
        if result.error is None and result.num_bytes > MAX_COMPILED_BYTES:
            return f"it takes {result.num_bytes} bytes when compiled, more than the limit of {MAX_COMPILED_BYTES}"
        if result.error is not None:
            return result.error
        outcome: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._compiling[key] = (set(range(self._num_ranks)), outcome)
        try:
            self._send_to_all(CompileGrammar(key, structural_tag))
            return await outcome
        finally:
            del self._compiling[key]


class _Trial:
    """The process that compiles on trial: started for the first grammar, and again after one that ended it."""

    def __init__(self, config: EngineConfig, vocabulary: Path) -> None:
        self._setup = TrialSetup(
            config.tokenizer_folder,
            config.args.trust_remote_code,
            config.model.vocab_size,
            config.model.eos_token_ids,
            str(vocabulary),
        )
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._is_closed = False

    async def compile(self, structural_tag: str) -> TrialResult:
        async with self._turn:
            if self._is_closed:
                return TrialResult("the engine has ended")
            try:
                if self._process is None or self._process.returncode is not None:  # it may have been killed
                    await self._start()
                return await self._ask(TrialGrammar(structural_tag), COMPILE_TIMEOUT_S)
            except TimeoutError:
                reason = f"compiling it takes longer than {COMPILE_TIMEOUT_S:g} s"
            except EOFError:
                reason = "compiling it takes too much memory"
            await self.stop()
            return TrialResult(reason)

    def close(self) -> None:
        """No more processes; what is being compiled ends."""
        self._is_closed = True
        self._kill()

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def stop(self) -> None:
        self._kill()
        if self._process is not None:
            await self._process.wait()
            self._process = None

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "nibble.controller.grammar_trial_process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
        )
        await self._ask(self._setup, _START_TIMEOUT_S)

    async def _ask(self, question: Any, timeout: float) -> TrialResult:
        """Raises TimeoutError, or EOFError when the process has ended."""
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(question) + b"\n")
            line = await asyncio.wait_for(self._process.stdout.readline(), timeout)
        except ConnectionError:
            raise EOFError from None
        if not line:
            raise EOFError
        return msgspec.json.decode(line, type=TrialResult)
