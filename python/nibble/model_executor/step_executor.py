"""Runs a step from its rows to its sampled tokens. Where steps overlap, the host does not wait for them here."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner
from nibble.model_executor.sampler import SampledBatch, SampledToken, Sampler, SamplingRow


class UnknownTokens(Protocol):
    """What a step samples."""

    def wait(self) -> list[SampledToken]:
        """One for each row that was to be sampled. Raises CollectiveError if a peer fails."""
        ...


class StepExecutor:
    def __init__(self, runner: ModelRunner, sampler: Sampler) -> None:
        self.runner, self.sampler = runner, sampler

    def clear_pages(self, pages: Iterable[int]) -> None:
        """Zeroes pages of the KV cache before the next step."""
        self.runner.pool.clear(pages)

    @torch.inference_mode()
    def launch(
        self,
        batch: ForwardBatch | None,
        rows: Sequence[SamplingRow],
        slots: Sequence[int],
        global_num_tokens: Sequence[int],
        decodes_only: bool,
        global_num_logit_rows: Sequence[int],
    ) -> "LaunchedStep":
        """Collective: all ranks call it, idle ones with no batch. `rows` are those of the batch that get a new token,
        and `slots` say where the next step finds it, if it does not wait.
        """
        logits = self.runner.forward(batch, global_num_tokens, decodes_only, global_num_logit_rows)
        sampled = self.sampler.launch(logits, rows) if rows else None
        if sampled is not None and self.runner.future_tokens is not None:
            self.runner.future_tokens.store(slots, sampled.token_ids)
        return LaunchedStep(self.runner, sampled)


class LaunchedStep:
    """A step that the device has been given. On a CPU it is done."""

    def __init__(self, runner: ModelRunner, sampled: SampledBatch | None) -> None:
        self._runner = runner
        self._sampled = sampled.to_host() if sampled is not None else None
        self._done = runner.record_event()

    def wait(self) -> list[SampledToken]:
        self._runner.synchronize(self._done)
        return self._sampled.tokens() if self._sampled is not None else []
