"""Grammars are compiled on trial, in a process that can be stopped, before any rank sees them."""

import asyncio
from pathlib import Path

import psutil
import pytest

from nibble.config.resolve import EngineConfig, resolve
from nibble.config.server_args import ServerArgs
from nibble.controller import grammars as module
from nibble.controller.async_engine import AsyncEngine
from nibble.controller.grammars import Grammars
from nibble.generation import GenerationRequest
from nibble.ipc.messages import CompileGrammar, ForgetGrammar, GrammarCompiled, ToRank
from nibble.sampling_params import SamplingParams
from nibble.structured_output.grammar import Grammar, make_grammar, regex_format
from nibble.utils.errors import EngineDeadError, RequestError
from server_process import DEMO_MODEL

TOO_SLOW = "|".join(f"[a-z]{{1,{length}}}x{length}" for length in range(1000, 1400))


def configuration(**flags: object) -> EngineConfig:
    return resolve(
        ServerArgs(model_path=str(DEMO_MODEL), tp_size=2, dp_size=2, ep_size=2, enable_dp_attention=True, **flags)
    )


def regex(pattern: str) -> Grammar:
    return make_grammar(regex_format(pattern), "regex")


class Ranks:
    """Two ranks that compile everything at once, as long as they `answer`."""

    def __init__(self, run_dir: Path) -> None:
        self.grammars = Grammars(configuration(), run_dir, self.send)
        self.sent: list[ToRank] = []
        self.answer = True

    def send(self, message: ToRank) -> None:
        self.sent.append(message)
        if isinstance(message, CompileGrammar) and self.answer:
            for rank in (1, 0):
                self.grammars.on_compiled(GrammarCompiled(rank, message.key, None))

    async def prepare(self, pattern: str) -> str | None:
        """The field at fault, and why."""
        try:
            await self.grammars.prepare(regex(pattern))
        except RequestError as error:
            return f"{error.field}: {error}"
        return None

    async def end(self) -> None:
        self.grammars.fail(EngineDeadError("a rank died"))
        await self.grammars.stop()


def test_the_life_of_grammars(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT_GRAMMARS", 2)

    async def live() -> None:
        ranks = Ranks(tmp_path)
        assert await asyncio.gather(*(ranks.prepare("ab") for _ in range(5))) == [None] * 5
        assert ranks.sent == [CompileGrammar(regex("ab").key, regex("ab").structural_tag)], "compiled once"

        refusal = await ranks.prepare("(a") or ""
        assert refusal.startswith("regex: ") and "parenthesis" in refusal
        assert len(ranks.sent) == 1, "no rank sees what is refused"

        monkeypatch.setattr(module, "COMPILE_TIMEOUT_S", 0.5)
        assert "takes longer than 0.5 s" in (await ranks.prepare(TOO_SLOW) or "")
        monkeypatch.setattr(module, "COMPILE_TIMEOUT_S", 20)
        monkeypatch.setattr(module, "MAX_COMPILED_BYTES", 100)
        assert "bytes when compiled, more than the limit of 100" in (await ranks.prepare("a{3}") or "")
        monkeypatch.setattr(module, "MAX_COMPILED_BYTES", 2**26)

        assert await ranks.prepare("ab") is None, "another process has taken over, and two others were forgotten"
        forgotten = [message.key for message in ranks.sent if isinstance(message, ForgetGrammar)]
        assert forgotten == [regex(pattern).key for pattern in ("ab", "(a", TOO_SLOW)]
        assert len(ranks.sent) == 1 + 3 + 1

        psutil.Process().children()[0].kill()
        await asyncio.sleep(0.1)
        assert await ranks.prepare("cd") is None, "nor does it matter who ends the process"

        ranks.answer = False
        waiting = asyncio.create_task(ranks.grammars.prepare(regex("never")))
        while not isinstance(ranks.sent[-1], CompileGrammar) or ranks.sent[-1].key != regex("never").key:
            await asyncio.sleep(0.01)
        ranks.grammars.on_compiled(GrammarCompiled(0, regex("never").key, None))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "both ranks must have it"
        await ranks.end()
        with pytest.raises(EngineDeadError):
            await waiting

    asyncio.run(live())


def test_a_server_without_grammars_refuses_them_by_name():
    async def generate() -> None:
        engine = AsyncEngine(configuration(grammar_backend="none"))
        await anext(engine.generate(GenerationRequest("x", [1], SamplingParams(grammar=regex("a")))))

    with pytest.raises(RequestError, match="regex needs a grammar, and this server runs with --grammar-backend none"):
        asyncio.run(generate())
