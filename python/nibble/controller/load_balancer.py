"""Chooses the DP rank of each request."""

from collections.abc import Sequence
from dataclasses import dataclass

from nibble.controller.prefix_record import PrefixRecord
from nibble.utils.errors import RequestError


@dataclass
class _Load:
    tokens: int = 0
    requests: int = 0


@dataclass
class Booking:
    """A request's place on a rank, and the tokens that the rank has still to compute or generate for it."""

    rank: int
    tokens: int
    prompt_tokens: int
    """Of these, until the first generated token says that the prompt has been computed."""


class LoadBalancer:
    """A request counts on its rank from the moment it is sent, whether or not the rank has answered.

    "total_tokens" sends it where, with the request, the fewest tokens are outstanding. Tokens of its prompt that the
    rank got before are likely to be cached and do not count, so a request follows its prefix exactly when that saves
    more than it unbalances. "total_requests" counts requests and looks at prefixes between equals, "round_robin" takes
    turns.
    """

    def __init__(self, dp_size: int, method: str = "total_tokens", prefixes: PrefixRecord | None = None) -> None:
        """`prefixes` is None where nothing is cached."""
        self._loads = [_Load() for _ in range(dp_size)]
        self._method = method
        self._prefixes = prefixes
        self._turn = 0

    def book(self, input_ids: Sequence[int], max_new_tokens: int, pinned_rank: int | None) -> Booking:
        """The rank for a request, which counts there until `release`."""
        if pinned_rank is not None and not 0 <= pinned_rank < len(self._loads):
            raise RequestError(
                f"data_parallel_rank must be between 0 and {len(self._loads) - 1}, got {pinned_rank}",
                "data_parallel_rank",
            )
        cached, keys = [0] * len(self._loads), []
        if self._prefixes is not None:
            keys = self._prefixes.keys(input_ids)
            cached = self._prefixes.cached_tokens(keys, len(self._loads))
        rank = self._choose(cached) if pinned_rank is None else pinned_rank
        if self._prefixes is not None:
            self._prefixes.add(keys, rank)
        prompt_tokens = len(input_ids) - min(cached[rank], len(input_ids) - 1)
        booking = Booking(rank, prompt_tokens + max_new_tokens, prompt_tokens)
        self._loads[rank].tokens += booking.tokens
        self._loads[rank].requests += 1
        return booking

    def progress(self, booking: Booking, num_tokens: int) -> None:
        """The rank has generated so many more tokens."""
        done = min(booking.tokens, booking.prompt_tokens + num_tokens)
        booking.prompt_tokens = 0
        booking.tokens -= done
        self._loads[booking.rank].tokens -= done

    def release(self, booking: Booking) -> None:
        """The request has ended."""
        self._loads[booking.rank].tokens -= booking.tokens
        self._loads[booking.rank].requests -= 1

    def forget_prefixes(self) -> None:
        """The ranks have forgotten what they had cached."""
        if self._prefixes is not None:
            self._prefixes.clear()

    def requests_per_rank(self) -> list[int]:
        return [load.requests for load in self._loads]

    def tokens_per_rank(self) -> list[int]:
        """Outstanding tokens."""
        return [load.tokens for load in self._loads]

    def _choose(self, cached: Sequence[int]) -> int:
        """`cached[rank]` tokens of the prompt are likely to be cached there."""
        ranks = range(len(self._loads))
        if self._method == "round_robin":
            self._turn += 1
            return (self._turn - 1) % len(self._loads)
        if self._method == "total_requests":
            return min(ranks, key=lambda rank: (self._loads[rank].requests, -cached[rank], self._loads[rank].tokens))
        return min(ranks, key=lambda rank: (self._loads[rank].tokens - cached[rank], self._loads[rank].requests))
