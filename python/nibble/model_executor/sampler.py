"""Chooses the next token of each request from its logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nibble.generation import TokenLogprob
from nibble.kernels.torch.sampling import argmax, filter_logits, gumbel_argmax
from nibble.sampling_params import SamplingParams

SMALLEST_TEMPERATURE = 1e-5
"""Below it sampling is greedy: dividing the logits by less would overflow."""


@dataclass(frozen=True)
class SamplingRow:
    """One request. The token drawn depends on logits, `seed` and the number of tokens generated, nothing else."""

    sampling: SamplingParams
    seed: int
    token_ids: Sequence[int]
    prompt_length: int
    top_logprobs_num: int | None
    """None when no log-probabilities are wanted."""

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_length


class SampledToken(NamedTuple):
    token_id: int | None
    """None when the row held numbers that are not finite."""
    logprob: TokenLogprob | None


class Sampler:
    def __init__(self, eos_token_ids: Sequence[int], argmax: Callable[[torch.Tensor], torch.Tensor] = argmax) -> None:
        """`argmax` as `kernels.torch.sampling.argmax`."""
        self.eos_token_ids = list(eos_token_ids)
        self.argmax = argmax

    def sample(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """`logits [R, V]` fp32, one row a request. Log-probabilities are the model's own, before any change."""
        tokens = self.argmax(logits)
        finite = (tokens >= 0).tolist()
        adjusted = self._adjust(logits, rows)
        if adjusted is not logits:
            tokens = adjusted.argmax(dim=-1)
        drawn = [index for index, row in enumerate(rows) if row.sampling.temperature >= SMALLEST_TEMPERATURE]
        if drawn:
            tokens[drawn] = _draw(adjusted[drawn], [rows[index] for index in drawn])
        logprobs = _logprobs(logits, rows, tokens)
        return [
            SampledToken(token if ok else None, logprob if ok else None)
            for token, ok, logprob in zip(tokens.tolist(), finite, logprobs, strict=True)
        ]

    def _adjust(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        """Logit bias, penalties and the ban on early stops, for the rows that have any."""
        changed = [index for index, row in enumerate(rows) if self._needs_adjustment(row)]
        if not changed:
            return logits
        logits = logits.clone()
        for index in changed:
            self._adjust_row(logits[index], rows[index])
        return logits

    def _needs_adjustment(self, row: SamplingRow) -> bool:
        sampling = row.sampling
        return bool(sampling.logit_bias or sampling.has_penalties or row.num_generated < sampling.min_new_tokens)

    def _adjust_row(self, logits: torch.Tensor, row: SamplingRow) -> None:
        """In place on `[V]`. Repetition looks at prompt and answer, the other penalties at the answer."""
        sampling = row.sampling
        if sampling.has_penalties:
            tokens = torch.tensor(row.token_ids, device=logits.device)
            seen = tokens.unique()
            repeated = logits[seen]
            factor = sampling.repetition_penalty
            logits[seen] = torch.where(repeated > 0, repeated / factor, repeated * factor)
            generated, counts = tokens[row.prompt_length :].unique(return_counts=True)
            logits[generated] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        if row.num_generated < sampling.min_new_tokens:
            logits[[*self.eos_token_ids, *sampling.stop_token_ids]] = float("-inf")


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Random tokens `[R]` for rows with a temperature."""
    sampling = [row.sampling for row in rows]
    vocab_size = logits.shape[1]
    device = logits.device
    logits = logits / torch.tensor([[s.temperature] for s in sampling], device=device)
    if any(s.top_k != -1 or s.top_p < 1 or s.min_p > 0 for s in sampling):
        logits = filter_logits(
            logits,
            torch.tensor([s.top_k if s.top_k > 0 else vocab_size for s in sampling], device=device),
            torch.tensor([s.top_p for s in sampling], device=device),
            torch.tensor([s.min_p for s in sampling], device=device),
        )
    seeds = torch.tensor([row.seed for row in rows], device=device)
    positions = torch.tensor([row.num_generated for row in rows], device=device)
    return gumbel_argmax(logits, seeds, positions)


def _logprobs(logits: torch.Tensor, rows: Sequence[SamplingRow], tokens: torch.Tensor) -> list[TokenLogprob | None]:
    wanted = [index for index, row in enumerate(rows) if row.top_logprobs_num is not None]
    found: list[TokenLogprob | None] = [None] * len(rows)
    if wanted:
        logprobs = logits[wanted].log_softmax(dim=-1)
        chosen = logprobs.gather(1, tokens[wanted, None])[:, 0].tolist()
        most = max(rows[index].top_logprobs_num or 0 for index in wanted)
        best, ids = (tensor.tolist() for tensor in logprobs.topk(most, dim=-1))
        for place, index in enumerate(wanted):
            count = rows[index].top_logprobs_num or 0
            top = tuple(zip(best[place][:count], ids[place][:count], strict=True))
            found[index] = TokenLogprob(chosen[place], int(tokens[index]), top)
    return found
