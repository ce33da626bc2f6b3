"""Chooses the DP rank of each request."""

from dataclasses import dataclass

from nibble.utils.errors import RequestError


@dataclass
class _Load:
    tokens: int = 0
    requests: int = 0


class LoadBalancer:
    """Fewest outstanding tokens first. A request counts from the moment it is sent, not when the rank answers."""

    def __init__(self, dp_size: int) -> None:
        self._loads = [_Load() for _ in range(dp_size)]

    def choose(self, num_tokens: int, pinned_rank: int | None) -> int:
        """The rank for a request of `num_tokens` (prompt and longest answer), booked there until `release`."""
        if pinned_rank is not None and not 0 <= pinned_rank < len(self._loads):
            raise RequestError(
                f"data_parallel_rank must be between 0 and {len(self._loads) - 1}, got {pinned_rank}",
                "data_parallel_rank",
            )
        rank = pinned_rank
        if rank is None:
            rank = min(range(len(self._loads)), key=lambda r: (self._loads[r].tokens, self._loads[r].requests))
        self._loads[rank].tokens += num_tokens
        self._loads[rank].requests += 1
        return rank

    def release(self, rank: int, num_tokens: int) -> None:
        self._loads[rank].tokens -= num_tokens
        self._loads[rank].requests -= 1

    def requests_per_rank(self) -> list[int]:
        return [load.requests for load in self._loads]
