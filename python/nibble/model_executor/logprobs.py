"""Log-probabilities of tokens: of those that were sampled from the logits, and of those that a prompt goes on with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nibble.generation import TokenLogprob
from nibble.utils.transfer import to_device, to_host


@dataclass(frozen=True)
class LogprobsWanted:
    """At each position, besides the token that is there: the likeliest ones, and the tokens named."""

    top: int
    named: tuple[int, ...] = ()


@dataclass(frozen=True)
class Logprobs:
    """Of L tokens, as tensors that may not have been computed yet: of the token that is there `chosen [L]`, of the
    likeliest `best [L, N]` with their `ids [L, N]`, and of those named `named [L, M]`, padded.
    """

    wanted: Sequence[LogprobsWanted]
    chosen: torch.Tensor
    best: torch.Tensor
    ids: torch.Tensor
    named: torch.Tensor

    def to_host(self) -> "Logprobs":
        """Copied to the host in the order of the device's work, for which the host must wait before it looks."""
        return Logprobs(self.wanted, to_host(self.chosen), to_host(self.best), to_host(self.ids), to_host(self.named))

    def of_tokens(self, token_ids: Sequence[int]) -> list[TokenLogprob]:
        """With the ids of the tokens that are there."""
        columns = (self.chosen.tolist(), self.best.tolist(), self.ids.tolist(), self.named.tolist())
        return [
            TokenLogprob(
                logprob,
                token,
                tuple(zip(best[: want.top], ids[: want.top], strict=True)),
                tuple(zip(named[: len(want.named)], want.named, strict=True)),
            )
            for want, token, logprob, best, ids, named in zip(self.wanted, token_ids, *columns, strict=True)
        ]


def compute_logprobs(logits: torch.Tensor, tokens: torch.Tensor, wanted: Sequence[LogprobsWanted]) -> Logprobs:
    """Of `tokens [L]` int64 under `logits [L, V]` fp32, L at least 1."""
    logprobs = logits.log_softmax(dim=-1)
    best, ids = logprobs.topk(max(want.top for want in wanted), dim=-1)
    most = max(len(want.named) for want in wanted)
    padded = [token for want in wanted for token in (*want.named, *[0] * (most - len(want.named)))]
    return Logprobs(
        wanted,
        logprobs.gather(1, tokens[:, None])[:, 0],
        best,
        ids,
        logprobs.gather(1, to_device(padded, logits.device).view(len(wanted), most)),
    )
