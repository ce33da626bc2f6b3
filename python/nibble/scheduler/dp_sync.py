"""The one message that all ranks exchange before each step."""

from dataclasses import dataclass

import torch

from nibble.distributed.communicator import Communicator


@dataclass(frozen=True)
class DpSyncResult:
    """What every rank derives, identically, from the gathered messages."""

    global_num_tokens: tuple[int, ...]
    """Rows of every attention group."""
    global_num_logit_rows: tuple[int, ...]
    """Those of them that need logits."""
    decodes_only: bool
    """Every sequence of every rank has one row in this step."""
    may_sleep: bool
    """No rank has work, and none has still to receive a message that another one knows of."""

    @property
    def runs(self) -> bool:
        """Whether there is a step; then every rank takes part in it, with or without rows."""
        return any(self.global_num_tokens)


class DpSync:
    """Runs in the group whose collectives the model uses; a group of one rank steps on its own.

    The ranks of an attention group, `attn_tp_size` neighbours, have the same requests and must say the same.
    """

    def __init__(self, group: Communicator, attn_tp_size: int = 1) -> None:
        self.group, self.attn_tp_size = group, attn_tp_size

    def exchange(self, num_tokens: int, num_logit_rows: int, decodes_only: bool, sequence: int) -> DpSyncResult:
        """Collective. `num_tokens` are this rank's rows, of which `num_logit_rows` need logits; `decodes_only` says
        that each is of another sequence, as it does of no rows. `sequence` is the newest message that brought work to
        any rank, as far as this one knows.

        Sockets deliver to each rank in order but not to all at once: a rank that has not heard yet what woke its
        peers reports an older number, and nobody sleeps until all report the same one. Raises RuntimeError when ranks
        of an attention group have diverged.
        """
        if self.group.world_size == 1:
            return DpSyncResult((num_tokens,), (num_logit_rows,), decodes_only, num_tokens == 0)
        message = [num_tokens, num_logit_rows, decodes_only, sequence]
        messages = self.group.all_gather(torch.tensor([message])).tolist()
        firsts = messages[:: self.attn_tp_size]
        if messages != [first for first in firsts for _ in range(self.attn_tp_size)]:
            raise RuntimeError(f"ranks of an attention group have diverged; what they say, by rank: {messages}")
        sizes, logit_rows, decodes, sequences = zip(*firsts, strict=True)
        return DpSyncResult(sizes, logit_rows, all(decodes), not any(sizes) and len(set(sequences)) == 1)
