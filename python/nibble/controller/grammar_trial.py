"""Starts the process that compiles grammars on trial, asks it, and sees it end."""

import asyncio
import contextlib
import logging
import signal
from pathlib import Path
from typing import Any

import msgspec

from nibble.config.resolve import EngineConfig
from nibble.controller.grammar_trial_process import TrialGrammar, TrialResult, TrialSetup
from nibble.utils.errors import OverloadedError
from nibble.utils.process import module_command, module_environment

logger = logging.getLogger(__name__)

COMPILE_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 120.0
_LINE_LIMIT = 2**20
_TRIES = 2
_KILLED = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes of a process that somebody else has ended; one that takes too much memory ends with others."""


class GrammarTrial:
    """The process is started for the first grammar, and again after one that ended it. It is asked one at a time."""

    def __init__(self, config: EngineConfig, vocabulary: Path) -> None:
        self._setup = TrialSetup(
            config.tokenizer_folder,
            config.args.trust_remote_code,
            config.model.vocab_size,
            config.model.eos_token_ids,
            str(vocabulary),
        )
        self._process: asyncio.subprocess.Process | None = None
        self._is_closed = False

    async def compile(self, structural_tag: str) -> TrialResult:
        """Raises OverloadedError when the process fails, again and again, for reasons that are not the grammar's."""
        for _ in range(_TRIES):
            if self._is_closed:
                return TrialResult("the engine has ended")
            try:
                if self._process is None or self._process.returncode is not None:
                    await self._start()
            except (OSError, EOFError) as error:
                self._warn(f"does not start: {error!r}")
                await self.stop()
                continue
            try:
                return await self._ask(TrialGrammar(structural_tag), COMPILE_TIMEOUT_S)
            except TimeoutError:
                await self.stop()
                return TrialResult(f"compiling it takes longer than {COMPILE_TIMEOUT_S:g} s")
            except EOFError:
                assert self._process is not None
                if (code := await self._process.wait()) not in _KILLED:
                    return TrialResult("compiling it takes too much memory")
                self._warn(f"was killed (exit code {code})")
        raise OverloadedError("the process that compiles grammars was killed or can't start; try again later")

    def _warn(self, what: str) -> None:
        if not self._is_closed:
            logger.warning("the process that compiles grammars %s", what)

    def close(self) -> None:
        """No more processes; what is being compiled ends."""
        self._is_closed = True
        self._kill()

    async def stop(self) -> None:
        self._kill()
        if self._process is not None:
            await self._process.wait()
            self._process = None

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *module_command("nibble.controller.grammar_trial_process"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            start_new_session=True,  # Ctrl-C in a terminal is for the server alone
            env=module_environment(),
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
