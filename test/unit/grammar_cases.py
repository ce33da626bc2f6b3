"""Grammars compiled for the tiny tokenizer."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import xgrammar

from nibble.structured_output.compiler import GrammarCompiler, save_vocabulary
from nibble.structured_output.grammar import Format, make_grammar
from nibble.structured_output.state import GrammarState
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
(EOS,) = TOKENIZER.eos_token_ids
VOCAB = TOKENIZER.vocab_size + 27
"""Padded, as embedding tables are, and no multiple of 32."""


def write_vocabulary(path: Path) -> None:
    special = TOKENIZER.special_token_ids
    tokens = [b"" if token in special else TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)]
    save_vocabulary(path, tokens, VOCAB, [EOS])


@functools.cache
def compiler() -> GrammarCompiler:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.json"
        write_vocabulary(path)
        return GrammarCompiler(path)


def begin(content: Format | dict[str, Any]) -> GrammarState:
    """The state of a request that has generated nothing yet."""
    compiled = compiler().compile(make_grammar(content, "test").structural_tag)
    return GrammarState(xgrammar.GrammarMatcher(compiled))
