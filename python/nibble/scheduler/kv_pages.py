"""Who owns which KV page of one rank."""

from array import array

from nibble.kv_cache.allocator import PageAllocator
from nibble.kv_cache.radix_cache import PrefixMatch, RadixCache, encode_tokens
from nibble.scheduler.request import Request


class KvPages:
    """Every page is free, or cached in the tree, or belongs to one running request.

    Of a running request's `pages`, the first `num_shared` are the tree's, which the request holds; the others are its
    own. They go to the tree once they are full and known to hold finite numbers: those of a prompt when it has been
    computed, so that others share them while the request still runs, the rest when the request leaves.
    """

    def __init__(self, num_pages: int, page_size: int, reuse_prefixes: bool) -> None:
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        self.cache = RadixCache(page_size)
        self._reuse_prefixes = reuse_prefixes
        self._dirty: list[int] = []

    @property
    def num_available(self) -> int:
        """Pages that requests can still get: the free ones, and those that are cached and held by nobody."""
        return self.allocator.num_free + self.cache.num_evictable

    def prepare(self, request: Request) -> None:
        """To be called before a request waits."""
        if self._reuse_prefixes:
            pages = request.num_reusable // self.page_size
            request.reusable_tokens = encode_tokens(request.token_ids[: pages * self.page_size])

    def match(self, request: Request) -> PrefixMatch:
        """What a waiting request would find cached, were it admitted."""
        return self.cache.match(request.reusable_tokens)

    def admit(self, request: Request) -> None:
        """The request takes what is cached of its tokens; they need not be computed."""
        request.prefix, pages = self.cache.acquire(request.reusable_tokens)
        request.pages = array("i", pages)
        request.reusable_tokens = b""
        request.num_shared = len(request.pages)
        request.num_computed = request.num_shared * self.page_size
        request.kv_is_finite = True
        if not request.num_generated:
            request.cached_tokens = request.num_computed

    def grow(self, request: Request, num_tokens: int) -> None:
        """Room for the next tokens. Raises RuntimeError when fewer pages are available than that takes."""
        missing = -(-(request.num_computed + num_tokens) // self.page_size) - len(request.pages)
        if missing > 0:
            to_evict = missing - self.allocator.num_free
            if to_evict > 0:
                self.allocator.free(self.cache.evict(to_evict))
            request.pages.extend(self.allocator.allocate(missing))

    def share(self, request: Request, num_tokens: int) -> None:
        """Caches the full pages of a request's first tokens. Where the same tokens are cached already, it takes those.

        A step under way may still read the pages that it gives up for them, and is done before anyone writes them.
        """
        first, last = request.num_shared, num_tokens // self.page_size
        if request.prefix is None or first >= last or not self._reuse_prefixes:
            return
        tokens = encode_tokens(request.token_ids[first * self.page_size : last * self.page_size])
        own = request.pages[first:last]
        request.prefix, cached = self.cache.extend(request.prefix, tokens, own)
        request.pages[first:last] = array("i", cached)
        request.num_shared = last
        self.allocator.free(mine for mine, shared in zip(own, cached, strict=True) if mine != shared)

    def release(self, request: Request) -> None:
        """The request leaves, and no step that writes its pages is under way.

        What it computed is cached if it is known to be finite, and forgotten otherwise.
        """
        if request.prefix is None:
            return
        if request.kv_is_finite:
            self.share(request, request.num_computed)
        own = request.pages[request.num_shared :]
        if not request.kv_is_finite:
            self._dirty += own
        self.allocator.free(own)
        self.cache.release(request.prefix)
        request.prefix, request.pages, request.num_shared, request.num_computed = None, array("i"), 0, 0

    def flush(self) -> None:
        """Forgets every cached page that no request holds."""
        self.allocator.free(self.cache.evict(self.cache.num_evictable))

    def take_dirty(self) -> list[int]:
        """Freed pages that may hold NaN, to be cleared before the next step: those of requests that ended early.

        Where the last token's logits were finite, every key and value before it was.
        """
        pages, self._dirty = self._dirty, []
        return pages

    def check_idle(self) -> None:
        """Without requests every page is free or cached, and none is held. Raises RuntimeError otherwise."""
        leaked = self.allocator.num_used - self.cache.num_pages
        if leaked:
            raise RuntimeError(f"{leaked} KV pages leaked")
        held = self.cache.num_pages - self.cache.num_evictable
        if held:
            raise RuntimeError(f"{held} cached KV pages are still held")
