"""Which DP rank gets a request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nibble.controller.load_balancer import LoadBalancer
from nibble.utils.errors import RequestError


def test_a_burst_does_not_land_on_one_rank():
    """What was sent counts at once, though no rank has answered yet."""
    balancer = LoadBalancer(4)
    ranks = [balancer.choose(100, None) for _ in range(512)]
    assert [ranks.count(rank) for rank in range(4)] == [128] * 4


def test_the_rank_with_the_fewest_outstanding_tokens_is_next():
    balancer = LoadBalancer(3)
    assert [balancer.choose(tokens, None) for tokens in (500, 100, 300)] == [0, 1, 2]
    assert balancer.choose(100, None) == 1
    balancer.release(0, 500)
    assert balancer.choose(100, None) == 0


def test_a_pinned_request_goes_where_it_is_pinned_and_counts_there():
    balancer = LoadBalancer(2)
    assert [balancer.choose(10, 1) for _ in range(3)] == [1, 1, 1]
    assert balancer.requests_per_rank() == [0, 3]
    assert balancer.choose(10, None) == 0


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_that_does_not_exist_is_refused_with_the_limit(rank):
    with pytest.raises(RequestError, match=f"between 0 and 1, got {rank}"):
        LoadBalancer(2).choose(1, rank)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), st.integers(1, 8))
def test_no_rank_is_ahead_of_another_by_more_than_one_request(sizes, ranks):
    balancer = LoadBalancer(ranks)
    tokens = [0] * ranks
    for size in sizes:
        tokens[balancer.choose(size, None)] += size
    assert max(tokens) - min(tokens) <= max(sizes)
