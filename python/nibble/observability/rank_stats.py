"""What a rank tells of itself, at most once a second and before it sleeps."""

import msgspec

NUM_ROW_BUCKETS = 16
ROW_BOUNDS = (0, *(2**power for power in range(NUM_ROW_BUCKETS - 2)))
"""Upper bounds of the buckets of rows per step, the last bucket's apart: 0, 1, 2, 4, … 8192."""


def row_bucket(rows: int) -> int:
    """The bucket of ROW_BOUNDS that a step with so many rows belongs to."""
    return min(1 + (rows - 1).bit_length(), NUM_ROW_BUCKETS - 1) if rows else 0


class RankStats(msgspec.Struct, frozen=True, tag=True):
    """Gauges as they are, counters since the rank started."""

    rank: int
    num_running: int = 0
    num_queued: int = 0
    num_used_tokens: int = 0
    """Tokens in KV pages that can't be taken away."""
    num_total_tokens: int = 0
    """What the KV cache of the rank holds."""
    gen_throughput: float = 0.0
    """Tokens generated per second since the last report; 0 asleep."""
    num_retracted: int = 0
    num_rows: int = 0
    steps_by_rows: tuple[int, ...] = (0,) * NUM_ROW_BUCKETS
    """Steps by their rows of this rank, in the buckets of ROW_BOUNDS."""
    dispatched_bytes: int = 0
    combined_bytes: int = 0
    dp_sync_seconds: float = 0.0
    queue_seconds: tuple[float, ...] = ()
    """How long each request waited that was admitted since the last report."""
