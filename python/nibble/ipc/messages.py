"""What the processes of the engine say to each other: msgpack over sockets in a private directory."""

from pathlib import Path

import msgspec

from nibble.generation import FinishReason, TokenLogprob
from nibble.observability.rank_stats import RankStats
from nibble.sampling_params import SamplingParams


class NewRequest(msgspec.Struct, frozen=True, tag=True):
    """To the rank that shall run a request. `sequence` numbers the messages that bring work, over all ranks."""

    sequence: int
    request_id: str
    input_ids: list[int]
    sampling: SamplingParams
    seed: int
    return_logprob: bool
    top_logprobs_num: int
    update_interval: int
    priority: int
    token_ids_logprob: tuple[int, ...] = ()
    logprob_start_len: int | None = None
    http_request_id: str | None = None
    """The id of the HTTP request that it belongs to, for the logs."""


class Wake(msgspec.Struct, frozen=True, tag=True):
    """To every other rank: the message `sequence` brought work to one of you."""

    sequence: int


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """To every rank, which forgets the prefixes of ended requests before it reads its next message."""


class CompileGrammar(msgspec.Struct, frozen=True, tag=True):
    """To every rank, which answers with GrammarCompiled; requests with the grammar are sent after that."""

    key: str
    structural_tag: str


class ForgetGrammar(msgspec.Struct, frozen=True, tag=True):
    key: str


class StartProfile(msgspec.Struct, frozen=True, tag=True):
    """To every rank: record what it does, from its next step on, until StopProfile or for `num_steps` steps."""

    folder: str
    name: str
    num_steps: int | None
    activities: tuple[str, ...]
    with_stack: bool
    record_shapes: bool


class StopProfile(msgspec.Struct, frozen=True, tag=True):
    """To every rank, which answers with ProfileWritten."""


class RankStage(msgspec.Struct, frozen=True, tag=True):
    """What a starting rank is doing, so that a start that hangs can say where."""

    rank: int
    stage: str


class RankReady(msgspec.Struct, frozen=True, tag=True):
    rank: int
    moe_comm_backend: str | None
    """Through which rows go to the experts and back, as it turned out when the ranks met."""


class RankFailed(msgspec.Struct, frozen=True, tag=True):
    """A rank can't go on, for a reason that the user can understand."""

    rank: int
    message: str
    waited_in_vain: bool
    """Whether it waited for another rank, whose stack then tells more than its own."""


class GrammarCompiled(msgspec.Struct, frozen=True, tag=True):
    """`error` says why a grammar could not be compiled."""

    rank: int
    key: str
    error: str | None


class ProfileWritten(msgspec.Struct, frozen=True, tag=True):
    """`path` is where a rank's trace is; `error` says why there is none."""

    rank: int
    path: str | None
    error: str | None


class TokenUpdate(msgspec.Struct, frozen=True, gc=False):
    """News of one request: tokens since the last update, and how it ended if it did.

    There is one for each request and step, so the garbage collector shall not count them: nothing here refers back,
    and empty tuples are no new objects.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...]
    cached_tokens: int
    """Tokens of the prompt that were in the prefix cache."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """Those that were wanted; they come with the first token."""


class TokenBatch(msgspec.Struct, frozen=True, tag=True):
    """What one step of one rank has to report."""

    rank: int
    updates: list[TokenUpdate]


ToRank = NewRequest | Wake | AbortRequest | FlushCache | CompileGrammar | ForgetGrammar | StartProfile | StopProfile
FromRank = RankStage | RankReady | RankFailed | TokenBatch | RankStats | GrammarCompiled | ProfileWritten


def rank_address(run_dir: Path, rank: int) -> str:
    return f"ipc://{run_dir}/rank{rank}"


def vocabulary_path(run_dir: Path) -> Path:
    """What the ranks' grammar compilers read; it is there once a grammar has been tried."""
    return run_dir / "vocabulary.json"


def stacks_written_path(run_dir: Path, rank: int) -> Path:
    """Grows by a byte whenever the rank has written its stacks to standard error."""
    return run_dir / f"stacks-written-{rank}"


def engine_address(run_dir: Path) -> str:
    return f"ipc://{run_dir}/engine"
