"""Notices ranks that have work and make no step."""

from collections.abc import Collection, Sequence


class Watchdog:
    """To be told the ranks' step counters every `interval` seconds.

    It counts how often it was told so, not the time: where the whole machine stood still, nobody is blamed for it.
    """

    def __init__(self, num_ranks: int, timeout: float, interval: float) -> None:
        self._timeout, self._interval = timeout, interval
        self._counters = [0] * num_ranks
        self._stalled = [0.0] * num_ranks
        """Seconds for which each rank has had work and made no step."""

    def stuck(self, counters: Sequence[int], busy: Collection[int]) -> list[int]:
        """The ranks that have been without a step for the timeout. `busy` are those that have work now."""
        for rank, counter in enumerate(counters):
            waits = rank in busy and counter == self._counters[rank]
            self._stalled[rank] = self._stalled[rank] + self._interval if waits else 0.0
            self._counters[rank] = counter
        return [rank for rank, seconds in enumerate(self._stalled) if seconds >= self._timeout]
