"""What one step of one rank feeds to the model."""

from dataclasses import dataclass

from nibble.layers.attention.backend import AttentionBatch


@dataclass(frozen=True)
class ForwardBatch:
    """T rows: `input_ids` and `positions` `[T]`; logits are computed for `logit_rows` only."""

    input_ids: list[int]
    positions: list[int]
    attention: AttentionBatch
    logit_rows: list[int]
