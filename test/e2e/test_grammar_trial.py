"""Grammars are compiled on trial, in a process that can be stopped, before any rank sees them."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nibble.config.resolve import EngineConfig, resolve
from nibble.config.server_args import ServerArgs
from nibble.controller import grammar_trial, grammars
from nibble.controller.async_engine import AsyncEngine
from nibble.controller.grammar_trial import GrammarTrial
from nibble.controller.grammar_trial_process import TrialResult
from nibble.controller.grammars import Grammars
from nibble.generation import GenerationRequest
from nibble.ipc.messages import CompileGrammar, ForgetGrammar, GrammarCompiled, ToRank, vocabulary_path
from nibble.sampling_params import SamplingParams
from nibble.structured_output.grammar import Grammar, ebnf_format, json_schema_format, make_grammar, regex_format
from nibble.utils.errors import EngineDeadError, OverloadedError, RequestError
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

    def __init__(self, run_dir: Path, trial: GrammarTrial | None = None) -> None:
        """`trial`: to use in place of a new process."""
        self.grammars = Grammars(configuration(), run_dir, self.send)
        if trial is not None:
            self.grammars._trial = trial
        self.sent: list[ToRank] = []
        self.answer = True

    @property
    def compiled(self) -> list[str]:
        return [message.key for message in self.sent if isinstance(message, CompileGrammar)]

    def send(self, message: ToRank) -> None:
        self.sent.append(message)
        if isinstance(message, CompileGrammar) and self.answer:
            for rank in (1, 0):
                self.grammars.on_compiled(GrammarCompiled(rank, message.key, None))

    async def prepare(self, pattern: str, given_up: asyncio.Future[None] | None = None) -> str | None:
        """The field at fault, and why."""
        try:
            await self.grammars.prepare(regex(pattern), given_up or asyncio.Future())
        except RequestError as error:
            return f"{error.field}: {error}"
        return None

    async def end(self) -> None:
        self.grammars.fail(EngineDeadError("a rank died"))
        await self.grammars.stop()


def test_the_life_of_grammars(tmp_path, monkeypatch):
    monkeypatch.setattr(grammars, "MAX_KEPT_GRAMMARS", 2)

    async def live() -> None:
        ranks = Ranks(tmp_path)
        assert await asyncio.gather(*(ranks.prepare("ab") for _ in range(5))) == [None] * 5
        assert ranks.sent == [CompileGrammar(regex("ab").key, regex("ab").structural_tag)], "compiled once"

        refusal = await ranks.prepare("(a") or ""
        assert refusal.startswith("regex: ") and "parenthesis" in refusal
        assert len(ranks.sent) == 1, "no rank sees what is refused"

        monkeypatch.setattr(grammar_trial, "COMPILE_TIMEOUT_S", 0.5)
        assert "takes longer than 0.5 s" in (await ranks.prepare(TOO_SLOW) or "")
        monkeypatch.setattr(grammar_trial, "COMPILE_TIMEOUT_S", 20)
        monkeypatch.setattr(grammars, "MAX_COMPILED_BYTES", 100)
        assert "bytes when compiled, more than the limit of 100" in (await ranks.prepare("a{3}") or "")
        monkeypatch.setattr(grammars, "MAX_COMPILED_BYTES", 2**26)

        assert await ranks.prepare("ab") is None, "another process has taken over, and two others were forgotten"
        forgotten = [message.key for message in ranks.sent if isinstance(message, ForgetGrammar)]
        assert forgotten == [regex(pattern).key for pattern in ("ab", "(a", TOO_SLOW)]
        assert len(ranks.sent) == 1 + 3 + 1

        ranks.answer = False
        waiting = asyncio.create_task(ranks.prepare("never"))
        while not isinstance(ranks.sent[-1], CompileGrammar) or ranks.sent[-1].key != regex("never").key:
            await asyncio.sleep(0.01)
        ranks.grammars.on_compiled(GrammarCompiled(0, regex("never").key, None))
        await asyncio.sleep(0.05)
        assert not waiting.done(), "both ranks must have it"
        await ranks.end()
        with pytest.raises(EngineDeadError):
            await waiting

    asyncio.run(live())


def live_with_ranks(tmp_path: Path, life: Callable[[Ranks], Coroutine[None, None, None]]) -> None:
    async def live() -> None:
        ranks = Ranks(tmp_path)
        try:
            await life(ranks)
        finally:
            await ranks.end()

    asyncio.run(live())


def test_what_is_compiled_when_the_engine_fails_keeps_nobody_waiting(tmp_path):
    """The trial's answer came just before, and then the ranks were waited for, which had gone."""

    async def life(ranks: Ranks) -> None:
        ranks.answer = False

        async def fail_meanwhile(structural_tag: str) -> TrialResult:
            ranks.grammars.fail(EngineDeadError("a rank died"))
            return TrialResult(num_bytes=1)

        ranks.grammars._trial.compile = fail_meanwhile
        with pytest.raises(EngineDeadError):
            await ranks.prepare("ab")
        await asyncio.wait_for(ranks.grammars.stop(), 10)

    live_with_ranks(tmp_path, life)


def test_nothing_is_imported_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "psutil.py").write_text("raise SystemExit('this is no part of the program')")
    monkeypatch.chdir(tmp_path)

    async def life(ranks: Ranks) -> None:
        assert await ranks.prepare("ab") is None

    live_with_ranks(tmp_path, life)


def test_a_server_without_grammars_refuses_them_by_name():
    async def generate() -> None:
        engine = AsyncEngine(configuration(grammar_backend="none"))
        await anext(engine.generate(GenerationRequest("x", [1], SamplingParams(grammar=regex("a")))))

    with pytest.raises(RequestError, match="regex needs a grammar, and this server runs with --grammar-backend none"):
        asyncio.run(generate())


# On one process, which is started again when a test has ended it


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def trial(runner, tmp_path_factory) -> Iterator[GrammarTrial]:
    trial = GrammarTrial(configuration(), vocabulary_path(tmp_path_factory.mktemp("trial")))
    yield trial
    runner.run(trial.stop())


@pytest.fixture
def live(runner, trial, tmp_path) -> Callable[[Callable[[Ranks], Coroutine[None, None, None]]], None]:
    return lambda life: runner.run(life(Ranks(tmp_path, trial)))


def trial_processes() -> list[psutil.Process]:
    """Those that have not ended; other children of this process have nothing to do with them."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if "grammar" in " ".join(child.cmdline()):
                found.append(child)
    return found


def trial_process() -> psutil.Process:
    return trial_processes()[0]


async def prepare_while_killing(ranks: Ranks, pattern: str, times: int) -> str | None:
    """Kills the process while it compiles, and those that follow it."""
    process = trial_process()
    process.suspend()
    preparing = asyncio.create_task(ranks.prepare(pattern))
    await asyncio.sleep(0.1)
    for _ in range(times - 1):
        process.kill()
        while not (others := [child for child in trial_processes() if child != process]):
            await asyncio.sleep(0.01)
        process = others[0]
    process.kill()
    return await preparing


def test_who_kills_the_trial_process_does_not_make_a_grammar_wrong(live):
    """It was said to take too much memory, for ever."""

    async def life(ranks: Ranks) -> None:
        await ranks.prepare("first")
        assert await prepare_while_killing(ranks, "once", 1) is None, "another process compiles it"
        with pytest.raises(OverloadedError, match="was killed"):
            await prepare_while_killing(ranks, "twice", 2)
        assert await ranks.prepare("twice") is None, "and that is not kept"

    live(life)


def test_what_nobody_waits_for_any_more_is_not_compiled(live, monkeypatch):
    """Grammars of clients that had gone away held up everybody's for as long as all of them took."""
    monkeypatch.setattr(grammar_trial, "COMPILE_TIMEOUT_S", 60)

    async def life(ranks: Ranks) -> None:
        await ranks.prepare("first")
        trial_process().suspend()
        begun = asyncio.create_task(ranks.prepare("begun"))
        given_up = [asyncio.Future() for _ in range(2)]
        aborted = [asyncio.create_task(ranks.prepare(f"aborted{i % 2}", given_up[i % 2])) for i in range(4)]
        shared = [asyncio.create_task(ranks.prepare("shared")) for _ in range(2)]
        left = asyncio.create_task(ranks.prepare("left"))
        last = asyncio.create_task(ranks.prepare("last"))
        await asyncio.sleep(0.1)
        for end in given_up:
            end.set_result(None)
        for client in (begun, shared[0], left):
            client.cancel()
        assert await asyncio.wait_for(asyncio.gather(*aborted), 5) == [None] * 4, "they wait for nothing"
        trial_process().resume()
        assert await asyncio.gather(shared[1], last) == [None, None]
        assert ranks.compiled == [regex(pattern).key for pattern in ("first", "begun", "shared", "last")]

    live(life)


@pytest.mark.parametrize(
    "grammar",
    [
        make_grammar(ebnf_format("root ::= root"), "ebnf"),
        make_grammar(json_schema_format({"$ref": "#"}), "json_schema"),
    ],
    ids=["ebnf", "schema"],
)
def test_a_grammar_that_no_answer_can_begin_is_refused(live, grammar):
    """It was a 500."""

    async def life(ranks: Ranks) -> None:
        with pytest.raises(RequestError, match="no token of the model fits its beginning") as refusal:
            await ranks.grammars.prepare(grammar, asyncio.Future())
        assert refusal.value.field == grammar.field

    live(life)


def test_all_that_is_kept_has_a_limit_together(live, monkeypatch):
    """64 grammars of 64 MiB were 4 GiB in each rank."""

    async def life(ranks: Ranks) -> None:
        for pattern in ("a{10}", "b{10}", "a{10}", "c{10}"):
            await ranks.prepare(pattern)
        num_bytes = sum(preparation.num_bytes for preparation in ranks.grammars._prepared.values())
        monkeypatch.setattr(grammars, "MAX_KEPT_BYTES", num_bytes + 100)
        await ranks.prepare("d{10}")
        assert ranks.sent[-2:] == [
            ForgetGrammar(regex("b{10}").key),
            CompileGrammar(regex("d{10}").key, regex("d{10}").structural_tag),
        ]

    live(life)


def test_a_grammar_that_takes_too_much_memory_is_refused_and_stays_so(live):
    async def life(ranks: Ranks) -> None:
        await ranks.prepare("first")
        memory = trial_process().memory_info().vms
        trial_process().rlimit(psutil.RLIMIT_AS, (memory, memory))
        assert "takes too much memory" in (await ranks.prepare(TOO_SLOW) or "")
        assert "takes too much memory" in (await ranks.prepare(TOO_SLOW) or "")
        assert ranks.compiled == [regex("first").key]

    live(life)
