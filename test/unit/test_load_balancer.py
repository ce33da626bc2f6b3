"""Which DP rank gets a request."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.controller.load_balancer import LoadBalancer
from nibble.controller.prefix_record import PrefixRecord
from nibble.utils.errors import RequestError

BLOCK = 4


def book(balancer: LoadBalancer, prompt: int | list[int] = 10, max_new_tokens: int = 0, rank: int | None = None) -> int:
    """The rank of a request with this prompt, or one of that many tokens that no other has."""
    tokens = [random.getrandbits(31) for _ in range(prompt)] if isinstance(prompt, int) else prompt
    return balancer.book(tokens, max_new_tokens, rank).rank


def with_prefixes(ranks: int, method: str = "total_tokens", max_blocks: int = 1000) -> LoadBalancer:
    return LoadBalancer(ranks, method, PrefixRecord(BLOCK, max_blocks))


def test_a_burst_does_not_land_on_one_rank():
    """What was sent counts at once, though no rank has answered yet."""
    balancer = LoadBalancer(4)
    ranks = [book(balancer, 100) for _ in range(512)]
    assert [ranks.count(rank) for rank in range(4)] == [128] * 4


@pytest.mark.parametrize("shared", [0, 400])
def test_after_a_burst_of_uneven_requests_no_rank_has_more_than_115_percent_of_the_mean(shared):
    """Also when all have a long beginning in common, which draws them to one rank."""
    generator = random.Random(0)
    balancer = with_prefixes(4)
    system = list(range(shared))
    for _ in range(512):
        prompt = system + [generator.getrandbits(31) for _ in range(generator.randint(10, 600))]
        balancer.book(prompt, generator.randint(1, 400), None)
    tokens = balancer.tokens_per_rank()
    assert max(tokens) <= 1.15 * sum(tokens) / 4


def test_the_rank_with_the_fewest_outstanding_tokens_is_next():
    balancer = LoadBalancer(3)
    bookings = [balancer.book([1] * tokens, 0, None) for tokens in (500, 100, 300)]
    assert [booking.rank for booking in bookings] == [0, 1, 2]
    assert book(balancer, 100) == 1
    balancer.release(bookings[0])
    assert book(balancer, 100) == 0


def test_what_has_been_computed_and_generated_is_no_longer_outstanding():
    balancer = LoadBalancer(2)
    booking = balancer.book([1] * 100, 50, None)
    assert balancer.tokens_per_rank() == [150, 0]
    balancer.progress(booking, 1)  # the first token: the prompt is done
    assert balancer.tokens_per_rank() == [49, 0]
    balancer.progress(booking, 9)
    assert balancer.tokens_per_rank() == [40, 0]
    balancer.release(booking)
    assert balancer.tokens_per_rank() == [0, 0]
    assert balancer.requests_per_rank() == [0, 0]


def test_a_pinned_request_goes_where_it_is_pinned_and_counts_there():
    for method in ("total_tokens", "total_requests", "round_robin"):
        balancer = LoadBalancer(2, method)
        assert [book(balancer, rank=1) for _ in range(3)] == [1, 1, 1]
        assert balancer.requests_per_rank() == [0, 3]
        assert book(balancer) == 0


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist_is_refused_with_the_limit(rank):
    with pytest.raises(RequestError, match=f"between 0 and 1, got {rank}"):
        book(LoadBalancer(2), rank=rank)


def test_round_robin_takes_turns_whatever_the_requests():
    balancer = with_prefixes(3, "round_robin")
    assert [book(balancer, tokens) for tokens in (900, 1, 1, 1, 900)] == [0, 1, 2, 0, 1]


def test_total_requests_counts_requests_of_any_size():
    balancer = with_prefixes(3, "total_requests")
    assert [book(balancer, tokens) for tokens in (900, 1, 5)] == [0, 1, 2]
    assert book(balancer, 1) == 1, "between equals the one with fewer tokens"
    assert book(balancer, 1) == 2


# Prefixes


def test_a_conversation_goes_back_to_the_rank_that_has_its_beginning():
    for method in ("total_tokens", "total_requests"):
        balancer = with_prefixes(4, method)
        for _ in range(6):
            balancer.release(balancer.book([random.getrandbits(31) for _ in range(40)], 10, None))
        first = balancer.book(list(range(40)), 10, rank := 2)
        balancer.release(first)
        assert book(balancer, [*range(40), 1, 2, 3]) == rank


@pytest.mark.parametrize(("ahead", "expected"), [(39, 0), (41, 1)])
def test_a_prefix_is_followed_only_as_long_as_that_saves_more_than_it_unbalances(ahead, expected):
    balancer = with_prefixes(2)
    balancer.release(balancer.book(list(range(40)), 10, 0))
    book(balancer, ahead, rank=0)
    assert book(balancer, [*range(40), 1]) == expected


def test_what_is_cached_is_not_outstanding():
    balancer = with_prefixes(1)
    book(balancer, list(range(10)))
    assert balancer.tokens_per_rank() == [10]
    balancer.book([*range(10), 11], 5, None)
    assert balancer.tokens_per_rank() == [10 + 3 + 5], "two whole blocks of four are known"
    balancer.book(list(range(8)), 0, None)
    assert balancer.tokens_per_rank() == [18 + 1], "the last token is always computed"


def test_forgotten_prefixes_draw_nobody():
    balancer = with_prefixes(2)
    balancer.release(balancer.book(list(range(40)), 10, 1))
    balancer.forget_prefixes()
    assert book(balancer, list(range(40))) == 0


def test_the_record_is_bounded_and_forgets_the_ends_of_old_prompts_first():
    record = PrefixRecord(BLOCK, max_blocks=5)
    old, new = record.keys(range(16)), record.keys(range(100, 112))
    record.add(old, 0)
    record.add(new, 1)
    assert len(record) == 5
    assert record.cached_tokens(old, 2) == [8, 0]
    assert record.cached_tokens(new, 2) == [0, 12]


def test_equal_blocks_behind_different_beginnings_are_different():
    record = PrefixRecord(BLOCK, max_blocks=100)
    record.add(record.keys([1, 2, 3, 4, 9, 9, 9, 9]), 0)
    assert record.cached_tokens(record.keys([5, 6, 7, 8, 9, 9, 9, 9]), 1) == [0]
    assert record.cached_tokens(record.keys([1, 2, 3, 4, 9, 9, 9, 8]), 1) == [4]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(1, 8))
def test_no_rank_is_ahead_of_another_by_more_than_one_request(sizes, ranks):
    balancer = LoadBalancer(ranks)
    for size in sizes:
        balancer.book([1] * size, 0, None)
    tokens = balancer.tokens_per_rank()
    assert max(tokens) - min(tokens) <= max(sizes)
