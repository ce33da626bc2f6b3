"""How far each rank has got, in memory that the ranks share with the engine's process."""

import mmap
from pathlib import Path

_COUNTER_BYTES = 8


class ProgressBoard:
    """One counter a rank: the rank counts its steps, the watchdog reads them, also while the rank is stuck."""

    def __init__(self, run_dir: Path, num_ranks: int) -> None:
        """Opens the board in the engine's private directory; whoever comes first creates it."""
        size = num_ranks * _COUNTER_BYTES
        with (run_dir / "progress").open("a+b") as file:
            file.truncate(size)
            self._counters = memoryview(mmap.mmap(file.fileno(), size)).cast("Q")

    def advance(self, rank: int) -> None:
        self._counters[rank] += 1

    def read(self) -> list[int]:
        return self._counters.tolist()
