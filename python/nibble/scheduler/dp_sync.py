"""The one message that all ranks exchange before each step."""

from dataclasses import dataclass

import torch

from nibble.distributed.communicator import Communicator


@dataclass(frozen=True)
class DpSyncResult:
    """What every rank derives, identically, from the gathered messages."""

    global_num_tokens: tuple[int, ...]
    decodes_only: bool
    """Every sequence of every rank has one row in this step."""
    may_sleep: bool
    """No rank has work, and none has still to receive a message that another one knows of."""

    @property
    def runs(self) -> bool:
        """Whether there is a step; then every rank takes part in it, with or without rows."""
        return any(self.global_num_tokens)


class DpSync:
    """Runs in the group whose collectives the model uses; a group of one rank steps on its own."""

    def __init__(self, group: Communicator) -> None:
        self.group = group

    def exchange(self, num_tokens: int, decodes_only: bool, sequence: int) -> DpSyncResult:
        """Collective. `num_tokens` are this rank's rows; `decodes_only` says that each is of another sequence, as it
        does of no rows. `sequence` is the newest message that brought work to any rank, as far as this one knows.

        Sockets deliver to each rank in order but not to all at once: a rank that has not heard yet what woke its
        peers reports an older number, and nobody sleeps until all report the same one.
        """
        if self.group.world_size == 1:
            return DpSyncResult((num_tokens,), decodes_only, num_tokens == 0)
        gathered = self.group.all_gather(torch.tensor([[num_tokens, decodes_only, sequence]]))
        sizes, decodes, sequences = gathered.t().tolist()
        return DpSyncResult(tuple(sizes), all(decodes), not any(sizes) and len(set(sequences)) == 1)
