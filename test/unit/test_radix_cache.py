"""The prefix cache against a plain dict from whole prefixes to pages: same matches, same pages, same evictions."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nibble.kv_cache.radix_cache import TOKEN_BYTES, Node, RadixCache, encode_tokens

PAGE = 2
Tokens = tuple[int, ...]

token_ids = st.integers(0, 2**32 - 1)


def pages_of(num_pages: int) -> st.SearchStrategy[Tokens]:
    """Tokens of whole pages, few different ones, so that prefixes are often shared."""
    page = st.sampled_from([(1, 1), (1, 2), (2, 1)])
    return st.lists(page, max_size=num_pages).map(lambda pages: tuple(token for page in pages for token in page))


def prefixes(tokens: Tokens) -> list[Tokens]:
    """All beginnings of whole pages, shortest first."""
    return [tokens[:end] for end in range(PAGE, len(tokens) + 1, PAGE)]


def content(cache: RadixCache) -> dict[Tokens, int]:
    """Everything that the tree holds: the page of each whole prefix."""
    found: dict[Tokens, int] = {}

    def walk(node: Node, above: Tokens) -> None:
        ids = memoryview(node.tokens).cast("I").tolist()
        assert len(ids) == PAGE * len(node.pages)
        for index, page in enumerate(node.pages):
            found[(*above, *ids[: (index + 1) * PAGE])] = page
        for first_page, child in node.children.items():
            assert child.parent is node
            assert child.pages, "a node without pages is no node"
            assert child.tokens.startswith(first_page)
            walk(child, (*above, *ids))

    walk(cache.root, ())
    return found


class RadixMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache = RadixCache(PAGE)
        self.model: dict[Tokens, int] = {}
        self.last_used: dict[Tokens, int] = {}
        self.held: list[tuple[Tokens, Node]] = []
        self.clock = 0
        self.next_page = 0

    def in_use(self) -> set[Tokens]:
        return {prefix for tokens, _ in self.held for prefix in prefixes(tokens)}

    def cached(self, tokens: Tokens) -> list[Tokens]:
        return [prefix for prefix in prefixes(tokens) if prefix in self.model]

    @rule(tokens=pages_of(6))
    def match(self, tokens):
        found = self.cached(tokens)
        match = self.cache.match(encode_tokens(tokens))
        assert match == (len(found), len(self.in_use() & set(found)))

    @rule(tokens=pages_of(6))
    def acquire(self, tokens):
        found = self.cached(tokens)
        node, pages = self.cache.acquire(encode_tokens(tokens))
        assert pages == [self.model[prefix] for prefix in found]
        self.held.append((found[-1] if found else (), node))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), more=pages_of(4))
    def extend(self, data, more):
        index = data.draw(st.integers(0, len(self.held) - 1))
        tokens, node = self.held[index]
        own = list(range(self.next_page, self.next_page + len(more) // PAGE))
        self.next_page += len(own)
        longer = prefixes(tokens + more)[len(tokens) // PAGE :]
        expected = [self.model.setdefault(prefix, page) for prefix, page in zip(longer, own, strict=True)]
        node, pages = self.cache.extend(node, encode_tokens(more), own)
        assert pages == expected
        self.held[index] = (tokens + more, node)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        tokens, node = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.cache.release(node)
        self.clock += 1
        self.last_used |= dict.fromkeys(prefixes(tokens), self.clock)

    @rule(data=st.data())
    def evict(self, data):
        count = data.draw(st.integers(0, min(3, len(self.model.keys() - self.in_use()))))
        expected = set()
        for _ in range(count):
            inner = {prefix[:-PAGE] for prefix in self.model}
            leaves = self.model.keys() - inner - self.in_use()
            oldest = min(leaves, key=self.last_used.__getitem__)
            expected.add(self.model.pop(oldest))
        evicted = self.cache.evict(count)
        assert len(evicted) == count and set(evicted) == expected

    @invariant()
    def the_tree_holds_what_the_model_holds_and_every_page_once(self):
        found = content(self.cache)
        assert found == self.model
        assert len(set(found.values())) == len(found) == self.cache.num_pages
        assert self.cache.num_evictable == len(found.keys() - self.in_use())

    def teardown(self):
        while self.held:
            self.cache.release(self.held.pop()[1])
        assert set(self.cache.evict(self.cache.num_evictable)) == set(self.model.values())
        assert content(self.cache) == {}


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def cached(cache: RadixCache, tokens: list[int], first_page: int) -> None:
    node, pages = cache.acquire(encode_tokens(tokens))
    rest = tokens[len(pages) * PAGE :]
    node, _ = cache.extend(node, encode_tokens(rest), range(first_page, first_page + len(rest) // PAGE))
    cache.release(node)


def test_a_page_that_matches_in_part_is_not_shared():
    cache = RadixCache(page_size=4)
    node, _ = cache.extend(cache.root, encode_tokens([1, 2, 3, 4, 5, 6, 7, 8]), [0, 1])
    cache.release(node)
    assert cache.match(encode_tokens([1, 2, 3, 4, 5, 6, 7, 9])).pages == 1
    assert cache.match(encode_tokens([1, 2, 3, 4, 5, 6, 7])).pages == 1
    assert cache.match(encode_tokens([1, 2, 3])).pages == 0


def test_the_same_tokens_behind_another_beginning_are_not_the_same():
    cache = RadixCache(PAGE)
    cached(cache, [1, 2, 3, 4], 0)
    assert cache.match(encode_tokens([3, 4])).pages == 0
    assert cache.match(encode_tokens([9, 9, 3, 4])).pages == 0


def test_a_long_branch_loses_its_end_first_and_only_as_much_as_is_needed():
    cache = RadixCache(PAGE)
    cached(cache, list(range(20)), 0)
    assert sorted(cache.evict(3)) == [7, 8, 9]
    assert cache.match(encode_tokens(range(20))).pages == 7


def test_what_is_used_again_outlives_what_is_not():
    cache = RadixCache(PAGE)
    for first_page, token in ((0, 1), (10, 2), (20, 3)):
        cached(cache, [token, token], first_page)
    cached(cache, [1, 1], 0)
    assert [cache.evict(1) for _ in range(3)] == [[10], [20], [0]]


def test_a_common_beginning_outlives_its_branches():
    cache = RadixCache(PAGE)
    cached(cache, [1, 1, 5, 5], 0)
    cached(cache, [1, 1, 6, 6], 10)
    cached(cache, [7, 7], 20)
    assert [cache.evict(1) for _ in range(4)] == [[1], [10], [0], [20]]


def test_what_is_held_stays():
    cache = RadixCache(PAGE)
    cached(cache, [1, 1, 2, 2, 3, 3], 0)
    node, _ = cache.acquire(encode_tokens([1, 1, 2, 2]))
    assert cache.evict(1) == [2]
    with pytest.raises(RuntimeError, match="1 cached KV pages to evict, 0 are evictable"):
        cache.evict(1)
    cache.release(node)
    with pytest.raises(RuntimeError, match="released twice"):
        cache.release(node)


def test_the_queue_of_leaves_does_not_grow_with_the_number_of_requests():
    cache = RadixCache(PAGE)
    for _ in range(100):
        cached(cache, [1, 1, 2, 2], 0)
    assert len(cache._queue) == 1


@given(a=st.lists(token_ids), b=st.lists(token_ids))
def test_different_tokens_have_different_bytes_of_a_fixed_width(a, b):
    assert (encode_tokens(a) == encode_tokens(b)) == (a == b)
    assert len(encode_tokens(a)) == TOKEN_BYTES * len(a)
