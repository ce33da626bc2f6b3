"""When ranks hold prefill back: one that computes a prompt makes all the others, which only decode, wait for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

SMOOTHING = 1 / 32
"""Weight of the newest observation in an average."""


class RankReport(NamedTuple):
    """What a rank says before each step. All fields are integers; the message is nothing but these."""

    num_tokens: int
    """Rows that it brings."""
    num_logit_rows: int
    """Those of them that need logits."""
    decodes_only: int
    """1 if each of them is of another sequence, as also of no rows."""
    prompt_steps: int
    """How many more steps the prompts take that it has begun."""
    num_ready: int
    """Waiting requests that it admits in this step, or would if that were allowed."""
    is_busy: int
    """1 if it has requests, running or waiting."""
    sequence: int
    """The newest message that brought work to any rank, as far as this one knows."""
    step_us: int
    """How long its last step took, in microseconds; 0 if there was none."""


@dataclass(frozen=True)
class DelayLimits:
    """How long prefill is held back at most at a time."""

    max_passes: int
    max_ms: float


class PrefillDelayer:
    """Decides before each step whether waiting requests may be admitted in the next one.

    Every rank derives the same from the same reports. While all ranks only decode, admission waits for more ranks to
    have something to admit, so that they compute their prompts in the same steps, as long as that pays: another step
    costs each held request the time of one decoding step; if in the meantime another rank gets something to admit, all
    decoding requests are spared the time by which a step with prefill exceeds one without. Both times, and how often
    ranks get something to admit, are measured averages. While prompts of the ranks that were waited for go on, others
    may join; those that join do not keep the door open for more.
    """

    def __init__(self, world_size: int, limits: DelayLimits) -> None:
        self.limits = limits
        self._ranks = range(world_size)
        self._may_admit = True
        self._had_ready = [False] * world_size
        self._ready_rate = 0.0
        """How likely a rank without anything to admit gets something in a step."""
        self._decode_us = 0.0
        self._prefill_us = 0.0
        self._last_step: Literal["prefill", "decode", "none"] = "none"
        self._passes = 0
        self._delayed_us = 0
        self._open_steps = 0
        """How long prompts go on that were held back."""

    def may_admit_next(self, reports: Sequence[RankReport]) -> bool:
        """Takes the reports of one step, those of all ranks; the same on every rank."""
        step_us = reports[0].step_us
        self._learn_times(step_us)
        self._learn_arrivals(reports)
        self._last_step = _kind_of_step(reports)
        delays = not self._may_admit and any(report.num_ready for report in reports)
        if self._may_admit:
            self._open_steps = max(r.prompt_steps for r in reports) if self._passes else max(0, self._open_steps - 1)
        self._passes = self._passes + 1 if delays else 0
        self._delayed_us = self._delayed_us + step_us if delays and self._passes > 1 else 0
        self._may_admit = (
            self._open_steps > 0
            or self._passes >= self.limits.max_passes
            or self._delayed_us >= self.limits.max_ms * 1000
            or not self._pays(reports)
        )
        return self._may_admit

    def _learn_times(self, step_us: int) -> None:
        """`step_us` is what the last step took, not the one that is about to begin."""
        if step_us and self._last_step == "decode":
            self._decode_us = _average(self._decode_us, step_us)
        elif step_us and self._last_step == "prefill":
            self._prefill_us = _average(self._prefill_us, step_us)

    def _learn_arrivals(self, reports: Sequence[RankReport]) -> None:
        had_none = [rank for rank in self._ranks if self._may_admit or not self._had_ready[rank]]
        now_ready = sum(reports[rank].num_ready > 0 for rank in had_none)
        if had_none:
            self._ready_rate += SMOOTHING * (now_ready / len(had_none) - self._ready_rate)
        self._had_ready = [report.num_ready > 0 for report in reports]

    def _pays(self, reports: Sequence[RankReport]) -> bool:
        """Before anyone has something to admit, the question is whether the first one would have to wait."""
        # As long as there was no step without prefill, it is taken for half of one with.
        decode_us = self._decode_us or self._prefill_us / 2
        num_ready = max(1, sum(report.num_ready > 0 for report in reports))
        num_held = max(1, sum(report.num_ready for report in reports))
        num_decoding = sum(report.num_tokens for report in reports if report.decodes_only)
        spared_us = max(0.0, self._prefill_us - decode_us) * num_decoding
        return self._ready_rate * (len(self._ranks) - num_ready) * spared_us > num_held * decode_us


def _kind_of_step(reports: Sequence[RankReport]) -> Literal["prefill", "decode", "none"]:
    if not any(report.num_tokens for report in reports):
        return "none"
    return "decode" if all(report.decodes_only for report in reports) else "prefill"


def _average(old: float, new: float) -> float:
    return old + SMOOTHING * (new - old) if old else new
