"""Which pages of the KV cache are free."""

from collections.abc import Iterable


class PageAllocator:
    """Hands out page ids 0 … num_pages - 1. A page belongs to whoever allocated it until that one frees it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._used)

    def allocate(self, count: int) -> list[int]:
        """Raises RuntimeError when fewer than `count` pages are free: callers ask `num_free` first."""
        if count > len(self._free):
            raise RuntimeError(f"{count} KV pages wanted, {len(self._free)} of {self.num_pages} free")
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Raises RuntimeError for a page that is not in use, before anything is freed."""
        pages = list(pages)
        if len(set(pages)) != len(pages) or not self._used.issuperset(pages):
            raise RuntimeError(f"KV pages freed twice or never allocated: {pages}")
        self._used.difference_update(pages)
        self._free.extend(pages)
