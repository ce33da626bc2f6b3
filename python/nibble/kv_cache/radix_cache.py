"""Which pages hold the keys and values of which tokens, so that requests with a common beginning share them."""

import heapq
from array import array
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

TOKEN_BYTES = array("I").itemsize


def encode_tokens(token_ids: Sequence[int]) -> bytes:
    """Token ids as bytes, `TOKEN_BYTES` each, without loss: equal bytes are equal tokens."""
    return array("I", token_ids).tobytes()


class PrefixMatch(NamedTuple):
    """How much of a prompt is cached. `locked_pages` of the `pages` are in use by running requests."""

    pages: int
    locked_pages: int


class Node:
    """A run of whole pages behind the parent's. Children differ in their first page at least."""

    __slots__ = ("children", "in_queue", "last_used", "locks", "pages", "parent", "serial", "tokens")

    def __init__(self, parent: "Node | None", tokens: bytes, pages: list[int], serial: int) -> None:
        self.parent = parent
        self.tokens = tokens  # TOKEN_BYTES * page_size bytes for each of `pages`
        self.pages = pages
        self.children: dict[bytes, Node] = {}  # by the tokens of their first page
        self.locks = 0
        """Held prefixes that end here or below."""
        self.last_used = 0
        self.in_queue = False
        self.serial = serial


class RadixCache:
    """A radix tree over token pages.

    Only whole pages are shared. Of a page that matches in part, the tokens are computed again: they are fewer than a
    page, and sharing them would mean copying it. Tokens are compared, hashes only find the candidates.

    A prefix is held from `acquire` to `release` and stays as long. What nobody holds may be evicted, least recently
    released first and from the ends of the branches, so that what is cached is always reachable. The tree decides
    which pages go; the caller frees them.

    Costs grow with the tokens and nodes of the prefix at hand, and `evict` with the logarithm of the tree.
    """

    def __init__(self, page_size: int) -> None:
        self._page_bytes = TOKEN_BYTES * page_size
        self._serials = count()
        self._clock = 0
        self._queue: list[tuple[int, int, Node]] = []
        """A heap by `last_used`: every leaf that nobody holds, once, and nodes that ceased to be one. A node that was
        used after it was queued is put back when its turn comes.
        """
        self.root = self._add(None, b"", [])
        self.num_pages = 0
        self.num_evictable = 0
        """Pages that nobody holds. They lie below those that somebody holds, so all of them can be evicted."""

    def match(self, tokens: bytes) -> PrefixMatch:
        """The whole pages that are cached of `encode_tokens(…)`. Changes nothing, not even the order of eviction."""
        pages = locked = 0
        for node, matching in self._descend(self.root, tokens):
            pages += matching
            locked += matching if node.locks else 0
        return PrefixMatch(pages, locked)

    def acquire(self, tokens: bytes) -> tuple[Node, list[int]]:
        """Holds what `match` counts until `release` of the node returned. Also returns the pages."""
        node, pages = self._end_of_match(self.root, tokens)
        self._lock(node, self.root)
        return node, pages

    def extend(self, held: Node, tokens: bytes, pages: Sequence[int]) -> tuple[Node, list[int]]:
        """Caches `pages`, which hold `tokens`, behind a held prefix; the longer one is held in its place.

        Returns its node, and the cache's pages for the tokens: `pages`, but where other requests have cached the same
        tokens before, theirs. Of those the caller's own stay with the caller.
        """
        node, cached = self._end_of_match(held, tokens)
        new = list(pages[len(cached) :])
        if new:
            node = self._add(node, tokens[len(cached) * self._page_bytes :], new)
            self.num_pages += len(new)
            self.num_evictable += len(new)
            cached += new
        self._lock(node, held)
        return node, cached

    def release(self, node: Node) -> None:
        """Ends what `acquire` or `extend` began. Raises RuntimeError for a node that is not held."""
        self._clock += 1
        ancestor = node
        while ancestor.parent is not None:
            if ancestor.locks == 0:
                raise RuntimeError("a cached prefix was released twice")
            ancestor.locks -= 1
            ancestor.last_used = self._clock
            if ancestor.locks == 0:
                self.num_evictable += len(ancestor.pages)
            ancestor = ancestor.parent
        self._enqueue(node)

    def evict(self, num_pages: int) -> list[int]:
        """Forgets that many pages and returns them. Raises RuntimeError when fewer are evictable."""
        if num_pages > self.num_evictable:
            raise RuntimeError(f"{num_pages} cached KV pages to evict, {self.num_evictable} are evictable")
        evicted: list[int] = []
        while len(evicted) < num_pages:
            last_used, _, node = heapq.heappop(self._queue)
            node.in_queue = False
            if last_used == node.last_used and _is_evictable(node):
                evicted += self._trim(node, num_pages - len(evicted))
            else:
                self._enqueue(node)
        return evicted

    def _descend(self, node: Node, tokens: bytes) -> Iterator[tuple[Node, int]]:
        """The nodes below `node` that `tokens` lead through, with the number of their pages that match, at least 1."""
        offset = 0
        while (child := node.children.get(tokens[offset : offset + self._page_bytes])) is not None:
            matching = self._matching_pages(child, tokens, offset)
            yield child, matching
            if matching < len(child.pages):
                return
            offset += len(child.tokens)
            node = child

    def _matching_pages(self, node: Node, tokens: bytes, offset: int) -> int:
        """How many of the node's pages `tokens[offset:]` begins with."""
        if tokens.startswith(node.tokens, offset):
            return len(node.pages)
        matching, too_many = 0, len(node.pages)
        while too_many - matching > 1:
            middle = (matching + too_many) // 2
            if tokens.startswith(node.tokens[: middle * self._page_bytes], offset):
                matching = middle
            else:
                too_many = middle
        return matching

    def _end_of_match(self, node: Node, tokens: bytes) -> tuple[Node, list[int]]:
        """Follows `tokens` from `node`. The last node ends where the match does, if it must be split for that."""
        pages: list[int] = []
        for child, matching in list(self._descend(node, tokens)):
            node = child if matching == len(child.pages) else self._split(child, matching)
            pages += node.pages
        return node, pages

    def _split(self, node: Node, num_pages: int) -> Node:
        """Makes the first pages of `node` a node of their own. `node` keeps the end: whoever holds it, holds both."""
        cut = num_pages * self._page_bytes
        upper = self._add(node.parent, node.tokens[:cut], node.pages[:num_pages])
        upper.locks = node.locks
        node.tokens, node.pages, node.parent = node.tokens[cut:], node.pages[num_pages:], upper
        upper.children[node.tokens[: self._page_bytes]] = node
        return upper

    def _trim(self, leaf: Node, num_pages: int) -> list[int]:
        """Takes at most so many pages from the end of a leaf."""
        kept = max(len(leaf.pages) - num_pages, 0)
        first_page = leaf.tokens[: self._page_bytes]
        evicted = leaf.pages[kept:]
        del leaf.pages[kept:]
        leaf.tokens = leaf.tokens[: kept * self._page_bytes]
        self.num_pages -= len(evicted)
        self.num_evictable -= len(evicted)
        if kept:
            self._enqueue(leaf)
        elif leaf.parent is not None:
            del leaf.parent.children[first_page]
            self._enqueue(leaf.parent)
        return evicted

    def _enqueue(self, node: Node) -> None:
        if _is_evictable(node) and not node.in_queue:
            node.in_queue = True
            heapq.heappush(self._queue, (node.last_used, node.serial, node))

    def _lock(self, node: Node, above: Node) -> None:
        """Counts one more holder on the way from `node` up to the held prefix `above`."""
        while node is not above:
            if node.locks == 0:
                self.num_evictable -= len(node.pages)
            node.locks += 1
            assert node.parent is not None
            node = node.parent

    def _add(self, parent: Node | None, tokens: bytes, pages: list[int]) -> Node:
        node = Node(parent, tokens, pages, next(self._serials))
        if parent is not None:
            parent.children[tokens[: self._page_bytes]] = node
        return node


def _is_evictable(node: Node) -> bool:
    return not node.locks and not node.children and node.parent is not None
