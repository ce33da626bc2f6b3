"""Compiles grammars on trial: `python -m nibble.controller.grammar_trial_process`.

Standard input brings a TrialSetup and then TrialGrammars, standard output answers each with a TrialResult, one line of
JSON each. What takes too long is ended with the whole process by whoever started it.
"""

import os
import resource
import sys
from pathlib import Path

import msgspec
import psutil
import setproctitle

from nibble.tokenizer.tokenizer import Tokenizer
from nibble.utils.process import die_with_parent_thread

_MEMORY_LIMIT = 2 * 2**30
"""Bytes that compiling may take beside what is loaded."""


class TrialSetup(msgspec.Struct):
    tokenizer_folder: str
    trust_remote_code: bool
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    vocabulary: str
    """The file to write for the ranks."""


class TrialGrammar(msgspec.Struct):
    structural_tag: str


class TrialResult(msgspec.Struct):
    error: str | None = None
    num_bytes: int = 0
    """What the compiled grammar takes."""


def main() -> None:
    # Here, since the engine's process reads this module's structs and has no use for xgrammar.
    from nibble.structured_output.compiler import GrammarCompiler, GrammarError, save_vocabulary

    die_with_parent_thread()
    os.nice(10)  # requests that run come first
    setproctitle.setproctitle("nibble grammar trial")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=TrialSetup)
    tokenizer = Tokenizer.from_pretrained(setup.tokenizer_folder, setup.trust_remote_code)
    token_bytes = [
        b"" if token in tokenizer.special_token_ids else tokenizer.token_bytes(token)
        for token in range(min(tokenizer.vocab_size, setup.vocab_size))
    ]
    vocabulary = Path(setup.vocabulary)
    partial = vocabulary.with_suffix(".partial")
    save_vocabulary(partial, token_bytes, setup.vocab_size, setup.eos_token_ids)
    partial.replace(vocabulary)
    compiler = GrammarCompiler(vocabulary)
    loaded = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (loaded + _MEMORY_LIMIT, loaded + _MEMORY_LIMIT))
    answers.write(_line(TrialResult()))
    for line in sys.stdin.buffer:
        try:
            compiled = compiler.compile(msgspec.json.decode(line, type=TrialGrammar).structural_tag)
            compiler.check_beginning(compiled)
            result = TrialResult(num_bytes=compiled.memory_size_bytes)
        except GrammarError as error:
            result = TrialResult(str(error))
        answers.write(_line(result))


def _line(result: TrialResult) -> bytes:
    return msgspec.json.encode(result) + b"\n"


if __name__ == "__main__":
    main()
