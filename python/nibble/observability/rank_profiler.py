"""Traces of what a rank does, by PyTorch's profiler."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_ACTIVITIES = {"CPU": torch.profiler.ProfilerActivity.CPU, "GPU": torch.profiler.ProfilerActivity.CUDA}


_NOTHING: tuple[str | None, str | None] = (None, "no profile was started")


class RankProfiler:
    """Records from `start` to `stop`, or for a number of steps. All in the thread that steps."""

    def __init__(self, rank: int, report: Callable[[str | None, str | None], None]) -> None:
        """`report` is told, at `stop`, where the trace is, and why there is none, if so."""
        self._rank = rank
        self._report = report
        self._profile: Any = None
        self._path = Path()
        self._steps_left: int | None = None
        self._outcome = _NOTHING

    def start(
        self,
        folder: str,
        name: str,
        num_steps: int | None,
        activities: Sequence[str],
        with_stack: bool,
        record_shapes: bool,
    ) -> None:
        """A profile that is being recorded is dropped."""
        if self._profile is not None:
            self._profile.stop()
        self._outcome = _NOTHING
        self._path = Path(folder) / f"{name}-rank-{self._rank}.trace.json.gz"
        self._steps_left = num_steps
        recorded = [_ACTIVITIES[activity] for activity in activities]
        self._profile = torch.profiler.profile(activities=recorded, with_stack=with_stack, record_shapes=record_shapes)
        self._profile.start()

    def step(self) -> None:
        """To be called after each step."""
        if self._profile is None or self._steps_left is None:
            return
        self._steps_left -= 1
        if self._steps_left == 0:
            self._write()

    def stop(self) -> None:
        if self._profile is not None:
            self._write()
        outcome, self._outcome = self._outcome, _NOTHING
        self._report(*outcome)

    def _write(self) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:
            self._outcome = (None, f"{self._path} can't be written: {error}")
        else:
            logger.info("wrote the profile %s", self._path)
            self._outcome = (str(self._path), None)
