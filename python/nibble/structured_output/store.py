"""The compiled grammars of one rank."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nibble.structured_output.grammar import Grammar
from nibble.structured_output.state import GrammarState

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar


class _Order(NamedTuple):
    key: str
    structural_tag: str


class GrammarStore:
    """Compiles in a thread of its own, while the rank goes on; the engine's process decides what is kept.

    xgrammar and the vocabulary are loaded for the first grammar, not before.
    """

    def __init__(self, vocabulary: Path, on_compiled: Callable[[str, str | None], None]) -> None:
        """`on_compiled` is called in the compiling thread, with a grammar's key and why it failed, if it did."""
        self._vocabulary = vocabulary
        self._on_compiled = on_compiled
        self._compiled: dict[str, CompiledGrammar] = {}
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def compile(self, key: str, structural_tag: str) -> None:
        """Returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._compile_all, name="grammar compiler", daemon=True)
            self._thread.start()
        self._orders.put(_Order(key, structural_tag))

    def forget(self, key: str) -> None:
        """Requests that have begun with the grammar go on with it."""
        self._compiled.pop(key, None)

    def begin(self, grammar: Grammar) -> GrammarState:
        """For a new request; the grammar has been compiled."""
        from xgrammar import GrammarMatcher

        return GrammarState(GrammarMatcher(self._compiled[grammar.key]))

    def _compile_all(self) -> None:
        from nibble.structured_output.compiler import GrammarCompiler, GrammarError

        compiler = GrammarCompiler(self._vocabulary)
        while True:
            key, structural_tag = self._orders.get()
            error = None
            try:
                self._compiled[key] = compiler.compile(structural_tag)
            except GrammarError as refusal:
                error = str(refusal)
            self._on_compiled(key, error)
