"""Runs a step from its rows to its sampled tokens. Where steps overlap, the host does not wait for them here."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from nibble.generation import TokenLogprob
from nibble.model_executor.forward_batch import ForwardBatch, ScoredToken
from nibble.model_executor.logprobs import Logprobs, compute_logprobs
from nibble.model_executor.model_runner import ModelRunner
from nibble.model_executor.sampler import SampledBatch, SampledToken, Sampler, SamplingRow
from nibble.utils.transfer import to_device


class UnknownTokens(Protocol):
    """What a step samples."""

    def wait(self) -> list[SampledToken]:
        """One for each row that was to be sampled. Raises CollectiveError if a peer fails."""
        ...

    def prompt_logprobs(self) -> list[TokenLogprob]:
        """Of the tokens that were to be scored, after `wait`."""
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
        logits, greedy = self.runner.run_step(batch, slots, global_num_tokens, decodes_only, global_num_logit_rows)
        scores = None
        if batch is not None and batch.scored:
            scores, logits = _score(logits, batch.scored)
        sampled = self.sampler.launch(logits, rows, greedy) if rows else None
        future = self.runner.future_tokens
        if sampled is not None and sampled.token_ids is not greedy and future is not None:
            future.store(to_device(slots, logits.device), sampled.token_ids)
        return LaunchedStep(self.runner, sampled, scores, () if batch is None else batch.scored)


def _score(logits: torch.Tensor, scored: Sequence[ScoredToken]) -> tuple[Logprobs, torch.Tensor]:
    """The log-probabilities of tokens of prompts, and the other rows of the logits, which are sampled from."""
    rows = [token.logits_row for token in scored]
    others = sorted(set(range(logits.shape[0])).difference(rows))
    tokens = to_device([token.token_id for token in scored], logits.device)
    scores = compute_logprobs(logits[to_device(rows, logits.device)], tokens, [token.wanted for token in scored])
    return scores, logits[to_device(others, logits.device)]


class LaunchedStep:
    """A step that the device has been given. On a CPU it is done."""

    def __init__(
        self,
        runner: ModelRunner,
        sampled: SampledBatch | None,
        scores: Logprobs | None,
        scored: Sequence[ScoredToken],
    ) -> None:
        self._runner = runner
        self._scores = scores.to_host() if scores is not None else None
        self._scored = scored
        self._sampled = sampled.to_host() if sampled is not None else None
        self._done = runner.record_event()

    def wait(self) -> list[SampledToken]:
        self._runner.synchronize(self._done)
        return self._sampled.tokens() if self._sampled is not None else []

    def prompt_logprobs(self) -> list[TokenLogprob]:
        return self._scores.of_tokens([token.token_id for token in self._scored]) if self._scores is not None else []
