"""How far a request has come in its grammar, and which tokens may follow."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from xgrammar import GrammarMatcher


class GrammarState:
    """Advances with each token of one request; it lives as long as the request, retracted or not."""

    def __init__(self, matcher: "GrammarMatcher") -> None:
        self._matcher = matcher

    @property
    def has_ended(self) -> bool:
        """An end of sequence has been accepted, and nothing can follow it."""
        return self._matcher.is_terminated()

    def accept(self, token: int) -> bool:
        """Takes the next token; false when the grammar does not allow it."""
        return self._matcher.accept_token(token)

    def fill(self, bitmask: torch.Tensor, row: int, unwanted: Sequence[int]) -> None:
        """Writes the allowed tokens into a row of `bitmask`, `[R, ceil(V / 32)]` int32 on the CPU.

        `unwanted` tokens are left out, unless no other is allowed.
        """
        self._matcher.fill_next_token_bitmask(bitmask, row)
        if unwanted:
            words = bitmask[row].numpy().view("uint32")
            allowed = words.copy()
            for token in unwanted:
                words[token // 32] &= ~(1 << token % 32) & 0xFFFFFFFF
            if not words.any():
                words[:] = allowed


def mask_logits(logits: torch.Tensor, rows: Mapping[int, tuple[GrammarState, Sequence[int]]]) -> None:
    """Sets to -inf, in place in `logits [R, V]` fp32, what the grammars of these rows do not allow.

    With each row's grammar come the tokens that are unwanted there, see `GrammarState.fill`.
    """
    import xgrammar  # by now it has been loaded

    bitmask = xgrammar.allocate_token_bitmask(*logits.shape)
    for row, (grammar, unwanted) in rows.items():
        grammar.fill(bitmask, row, unwanted)
    xgrammar.apply_token_bitmask_inplace(logits, bitmask.to(logits.device), indices=list(rows))
