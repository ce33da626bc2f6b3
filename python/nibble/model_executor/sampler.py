"""Chooses the next token of each request from its logits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from nibble.generation import TokenLogprob
from nibble.kernels.torch.sampling import argmax, filter_logits, gumbel_argmax
from nibble.model_executor.logprobs import Logprobs, LogprobsWanted, compute_logprobs
from nibble.sampling_params import SamplingParams
from nibble.structured_output.state import GrammarState, mask_logits
from nibble.utils.transfer import to_device, to_host

SMALLEST_TEMPERATURE = 1e-5
"""Below it sampling is greedy: dividing the logits by less would overflow."""


@dataclass(frozen=True)
class SamplingRow:
    """One request. The token drawn depends on logits, `seed` and the number of tokens generated, nothing else."""

    sampling: SamplingParams
    seed: int
    token_ids: Sequence[int]
    prompt_length: int
    logprobs: LogprobsWanted | None
    grammar: GrammarState | None = None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @cached_property
    def wants_the_likeliest(self) -> bool:
        """At every step, and nothing besides."""
        is_greedy = self.sampling.temperature < SMALLEST_TEMPERATURE and self.sampling.min_new_tokens == 0
        return is_greedy and not self.changes_logits and self.logprobs is None

    @property
    def changes_logits(self) -> bool:
        return bool(self.sampling.logit_bias) or self.sampling.has_penalties or self.grammar is not None


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
        """What `launch` samples, once it is known."""
        return self.launch(logits, rows).tokens()

    def launch(
        self, logits: torch.Tensor, rows: Sequence[SamplingRow], greedy: torch.Tensor | None = None
    ) -> "SampledBatch":
        """`logits [R, V]` fp32, one row a request; `greedy` is their `argmax` where that is known, and is what becomes
        the batch's tokens if all are chosen so. Log-probabilities are the model's own, before any change.
        """
        if greedy is None:
            greedy = self.argmax(logits)
        if all(row.wants_the_likeliest for row in rows):
            return SampledBatch(greedy, (), None)
        tokens = greedy
        adjusted = self._adjust(logits, rows)
        drawn = [index for index, row in enumerate(rows) if row.sampling.temperature >= SMALLEST_TEMPERATURE]
        if adjusted is not logits or drawn:
            tokens = adjusted.argmax(dim=-1) if adjusted is not logits else greedy.clone()
            if drawn:
                chosen = slice(None) if len(drawn) == len(rows) else to_device(drawn, logits.device)
                tokens[chosen] = _draw(adjusted[chosen], [rows[index] for index in drawn])
            tokens = tokens.where(greedy >= 0, -1)
        wanted = {index: row.logprobs for index, row in enumerate(rows) if row.logprobs is not None}
        return SampledBatch(tokens, list(wanted), _logprobs(logits, tokens, wanted))

    def _adjust(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        """Logit bias, penalties, the ban on early stops and grammars, for the rows that have any."""
        changed = [index for index, row in enumerate(rows) if self._needs_adjustment(row)]
        if not changed:
            return logits
        logits = logits.clone()
        for index in changed:
            self._adjust_row(logits[index], rows[index])
        grammars = {
            index: (row.grammar, self._unwanted(row)) for index, row in enumerate(rows) if row.grammar is not None
        }
        if grammars:
            mask_logits(logits, grammars)
        return logits

    def _needs_adjustment(self, row: SamplingRow) -> bool:
        return row.changes_logits or row.num_generated < row.sampling.min_new_tokens

    def _unwanted(self, row: SamplingRow) -> list[int]:
        """What must not end the answer yet. Only with a grammar is the end of sequence avoided by `ignore_eos`: a
        grammar ends with it, while other answers simply go on behind it."""
        if row.num_generated < row.sampling.min_new_tokens:
            return [*self.eos_token_ids, *row.sampling.stop_token_ids]
        return self.eos_token_ids if row.sampling.ignore_eos and row.grammar is not None else []

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
        if row.grammar is None and row.num_generated < sampling.min_new_tokens:
            logits.index_fill_(0, to_device(self._unwanted(row), logits.device), float("-inf"))


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Random tokens `[R]` for rows with a temperature."""
    sampling = [row.sampling for row in rows]
    vocab_size = logits.shape[1]
    integers = [(r.seed, r.num_generated, r.sampling.top_k if r.sampling.top_k > 0 else vocab_size) for r in rows]
    fractions = [(s.temperature, s.top_p, s.min_p) for s in sampling]
    seeds, positions, top_k = to_device(integers, logits.device).unbind(1)
    temperature, top_p, min_p = to_device(fractions, logits.device, torch.float32).unbind(1)
    logits = logits / temperature[:, None]
    if any(s.top_k != -1 or s.top_p < 1 or s.min_p > 0 for s in sampling):
        logits = filter_logits(logits, top_k, top_p, min_p)
    return gumbel_argmax(logits, seeds, positions)


@dataclass(frozen=True)
class SampledBatch:
    """What was sampled for R rows, as tensors that may not have been computed yet."""

    token_ids: torch.Tensor  # [R] int64, -1 where the logits are not finite
    logprob_rows: Sequence[int]
    """Those that want log-probabilities."""
    logprobs: Logprobs | None

    def to_host(self) -> "SampledBatch":
        """Copied to the host in the order of the device's work, for which the host must wait before it looks."""
        logprobs = self.logprobs.to_host() if self.logprobs is not None else None
        return SampledBatch(to_host(self.token_ids), self.logprob_rows, logprobs)

    def tokens(self) -> list[SampledToken]:
        token_ids = self.token_ids.tolist()
        if self.logprobs is None:
            return [SampledToken(token, None) if token >= 0 else SampledToken(None, None) for token in token_ids]
        found = self.logprobs.of_tokens([token_ids[row] for row in self.logprob_rows])
        logprobs = dict(zip(self.logprob_rows, found, strict=True))
        return [
            SampledToken(token, logprobs.get(row)) if token >= 0 else SampledToken(None, None)
            for row, token in enumerate(token_ids)
        ]


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, wanted: Mapping[int, LogprobsWanted]) -> Logprobs | None:
    if not wanted:
        return None
    index = to_device(list(wanted), logits.device)
    return compute_logprobs(logits[index], tokens[index].clamp(min=0), list(wanted.values()))
