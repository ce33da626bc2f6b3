"""What one step of one rank feeds to the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.logprobs import LogprobsWanted


class ScoredToken(NamedTuple):
    """A token of a prompt whose log-probability is wanted: the `logits_row`-th of the logits say it."""

    logits_row: int
    token_id: int
    wanted: LogprobsWanted


@dataclass(frozen=True)
class ForwardBatch:
    """T rows: `input_ids` and `positions` `[T]`; logits are computed for `logit_rows` only.

    Tokens are sampled from the logits that are not there for `scored` tokens of prompts.
    """

    input_ids: list[int]
    positions: list[int]
    attention: AttentionBatch
    logit_rows: list[int]
    scored: Sequence[ScoredToken] = ()
