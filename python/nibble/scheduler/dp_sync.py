"""The one message that all ranks exchange before each step."""

from dataclasses import dataclass

import torch

from nibble.distributed.communicator import Communicator
from nibble.scheduler.prefill_delayer import DelayLimits, PrefillDelayer, RankReport


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
    may_admit_next: bool = True
    """Whether waiting requests may join in the next step."""

    @property
    def runs(self) -> bool:
        """Whether there is a step; then every rank takes part in it, with or without rows."""
        return any(self.global_num_tokens)


class DpSync:
    """Runs in the group whose collectives the model uses; a group of one rank steps on its own.

    The ranks of an attention group, `attn_tp_size` neighbours, have the same requests and must say the same.

    The message is `RankReport` as int64, sent from and received into the same memory at every step.
    """

    def __init__(self, group: Communicator, attn_tp_size: int = 1, delay: DelayLimits | None = None) -> None:
        """`delay` is None where no rank holds prefill back for the others."""
        self.group, self.attn_tp_size = group, attn_tp_size
        num_groups = group.world_size // attn_tp_size
        self._delayer = PrefillDelayer(num_groups, delay) if delay and num_groups > 1 else None
        self._own = torch.zeros(1, len(RankReport._fields), dtype=torch.int64)
        self._all = torch.zeros(group.world_size, len(RankReport._fields), dtype=torch.int64)
        self._own_values = self._own.numpy()[0]  # the same memory
        self._gather = group.prepare_all_gather(self._own, self._all)

    def exchange(self, report: RankReport) -> DpSyncResult:
        """Collective.

        Sockets deliver to each rank in order but not to all at once: a rank that has not heard yet what woke its
        peers reports an older sequence number, and nobody sleeps until all report the same one. Raises RuntimeError
        when ranks of an attention group have diverged.
        """
        reports = [report] if self.group.world_size == 1 else self._exchange(report)
        is_quiet = not any(report.is_busy for report in reports)
        return DpSyncResult(
            tuple([report.num_tokens for report in reports]),
            tuple([report.num_logit_rows for report in reports]),
            all(report.decodes_only for report in reports),
            is_quiet and len({report.sequence for report in reports}) == 1,
            self._delayer.may_admit_next(reports) if self._delayer else True,
        )

    def _exchange(self, report: RankReport) -> list[RankReport]:
        """One report of each attention group."""
        self._own_values[:] = report
        self._gather()
        messages: list[list[int]] = self._all.tolist()
        firsts = messages[:: self.attn_tp_size]
        if self.attn_tp_size > 1:
            said = [message[:-1] for message in messages]  # step_us is each rank's own
            if said != [first[:-1] for first in firsts for _ in range(self.attn_tp_size)]:
                raise RuntimeError(f"ranks of an attention group have diverged; what they say, by rank: {messages}")
        return [RankReport._make(message) for message in firsts]
