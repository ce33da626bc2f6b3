"""The log-probabilities of a prompt's own tokens, which come with its computation, chunk by chunk."""

from collections.abc import Iterable

from nibble.generation import TokenLogprob
from nibble.model_executor.logprobs import LogprobsWanted


class PromptScores:
    """Of one request: the logits at position p give the log-probability of the token at p + 1.

    Positions from `start` to the last but one, none of them if that is None, are scored once each, in order, even if
    they are computed again later.
    """

    def __init__(self, start: int | None, prompt_length: int, wanted: LogprobsWanted) -> None:
        self.wanted = wanted
        self._end = prompt_length - 1
        self.next_position = self._end if start is None else start
        self._logprobs: list[TokenLogprob] = []

    @property
    def is_complete(self) -> bool:
        return self.next_position >= self._end

    def positions(self, start: int, num_tokens: int) -> range:
        """Those to score among so many that a step computes."""
        return range(max(start, self.next_position), min(start + num_tokens, self._end))

    def begin(self, start: int, num_tokens: int) -> int:
        """A step computes these tokens: what is scored there, it will `take`. Returns how many that are."""
        count = len(self.positions(start, num_tokens))
        self.next_position += count
        return count

    def take(self, logprobs: Iterable[TokenLogprob]) -> None:
        self._logprobs += logprobs

    def hand_over(self) -> tuple[TokenLogprob, ...]:
        """What has been scored since it was last handed over."""
        logprobs, self._logprobs = self._logprobs, []
        return tuple(logprobs)
