"""Grammars compiled for a vocabulary by xgrammar."""

import re
from collections.abc import Sequence
from pathlib import Path

import xgrammar

_SOURCE_LOCATION = re.compile(r"^\[[\d:]+\] \S+\.(?:cc|h):\d+: ")

_OUT_OF_MEMORY = "std::bad_alloc"


class GrammarError(ValueError):
    """xgrammar does not accept a grammar."""


def save_vocabulary(path: Path, token_bytes: Sequence[bytes], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
    """Writes what compiling needs to know of the tokens. Those without bytes, and those after them up to `vocab_size`,
    are allowed nowhere."""
    vocabulary = xgrammar.TokenizerInfo(
        list(token_bytes),
        vocab_type=xgrammar.VocabType.RAW,
        vocab_size=vocab_size,
        stop_token_ids=list(eos_token_ids),
    )
    path.write_text(vocabulary.serialize_json(), encoding="utf-8")


class GrammarCompiler:
    """Compiles for the vocabulary that `save_vocabulary` has written. Other threads run meanwhile."""

    def __init__(self, vocabulary: Path) -> None:
        info = xgrammar.TokenizerInfo.deserialize_json(vocabulary.read_text(encoding="utf-8"))
        self._vocab_size = info.vocab_size
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, structural_tag: str) -> xgrammar.CompiledGrammar:
        """Raises GrammarError with the reason."""
        try:
            return self._compiler.compile_structural_tag(structural_tag)
        # What xgrammar does not accept it reports by several types, RuntimeError among them.
        except Exception as error:
            if isinstance(error, MemoryError) or _OUT_OF_MEMORY in str(error):
                raise GrammarError("compiling it takes too much memory") from error
            raise GrammarError(_SOURCE_LOCATION.sub("", str(error)).strip()) from error

    def check_beginning(self, compiled: xgrammar.CompiledGrammar) -> None:
        """Raises GrammarError when an answer can't begin."""
        bitmask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        xgrammar.GrammarMatcher(compiled).fill_next_token_bitmask(bitmask)
        if not bitmask.any():
            raise GrammarError("no token of the model fits its beginning")
