"""Which rank got which prompts: what the load balancer can know of the ranks' prefix caches."""

from collections import OrderedDict
from collections.abc import Sequence

from nibble.kv_cache.radix_cache import encode_tokens


class PrefixRecord:
    """Remembers the ranks of recent prompts, block by block, each block with all that precedes it.

    It is bounded and approximate: the ranks decide themselves what they evict, blocks are known by a 64-bit hash, and
    the last incomplete one is not known at all. A wrong guess costs balance or a prefill, and never a wrong answer.
    """

    def __init__(self, block_tokens: int, max_blocks: int) -> None:
        """`block_tokens` is a multiple of a page; the `max_blocks` used last are remembered."""
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._ranks: OrderedDict[int, int] = OrderedDict()
        """For each block a bit for every rank that got it; least recently used first."""

    def __len__(self) -> int:
        return len(self._ranks)

    def keys(self, input_ids: Sequence[int]) -> list[int]:
        """One for each whole block of a prompt; equal prefixes have equal keys."""
        size = self._block_tokens
        keys: list[int] = []
        key = 0
        for end in range(size, len(input_ids) + 1, size):
            key = hash((key, encode_tokens(input_ids[end - size : end])))
            keys.append(key)
        return keys

    def cached_tokens(self, keys: Sequence[int], num_ranks: int) -> list[int]:
        """For each rank, how many tokens at the beginning of a prompt it got before."""
        cached = [0] * num_ranks
        still = (1 << num_ranks) - 1  # ranks that got every block so far
        for count, key in enumerate(keys, start=1):
            still &= self._ranks.get(key, 0)
            if not still:
                break
            for rank in range(num_ranks):
                if still >> rank & 1:
                    cached[rank] = count * self._block_tokens
        return cached

    def add(self, keys: Sequence[int], rank: int) -> None:
        """The rank gets a prompt. Its last block is forgotten before those that lead there."""
        for key in reversed(keys):
            self._ranks[key] = self._ranks.get(key, 0) | 1 << rank
            self._ranks.move_to_end(key)
        while len(self._ranks) > self._max_blocks:
            self._ranks.popitem(last=False)

    def clear(self) -> None:
        self._ranks.clear()
