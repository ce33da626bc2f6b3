"""What a step processes: decode first, prompts in chunks, the last one gives way; and whose turn it is."""

from hypothesis import given
from hypothesis import strategies as st

from nibble.scheduler.policy import Claim, RequestView, Snapshot, StepPlan, admission_order, pages_for, plan_step

PAGE = 4


def plan(running=(), waiting=(), available_pages=100, budget=8, max_running=16) -> StepPlan:
    decoding = [request for request in running if request.remaining == 1]
    decode_pages = sum(pages_for(request.computed + 1, PAGE) - request.pages for request in decoding)
    prompts = [request for request in running if request.remaining > 1]
    return plan_step(Snapshot(len(running), decode_pages, prompts, waiting, available_pages, PAGE, budget, max_running))


def settled_plan(running, available_pages, budget=8) -> tuple[StepPlan, int]:
    """The plan after as many retractions as it takes, and how many requests are left; none shares pages."""
    running = list(running)
    while (result := plan(running, (), available_pages, budget)).retracts:
        available_pages += running.pop().pages
    return result, len(running)


def decoding(tokens: int) -> RequestView:
    return RequestView(computed=tokens, remaining=1, pages=pages_for(tokens, PAGE))


def prompt(tokens: int, computed: int = 0) -> RequestView:
    return RequestView(computed, tokens - computed, pages_for(computed, PAGE))


def test_nothing_to_do_is_an_empty_plan():
    assert plan() == StepPlan()


def test_every_running_request_decodes_while_a_prompt_is_chunked():
    result = plan(running=[decoding(5), decoding(9)], waiting=[prompt(20)], budget=8)
    assert result == StepPlan(admitted=(8,))


def test_a_started_prompt_goes_on_before_another_is_admitted():
    result = plan(running=[prompt(20, computed=8)], waiting=[prompt(3)], budget=8)
    assert result == StepPlan(prompts=(8,))


def test_the_budget_is_shared_by_several_prompts():
    result = plan(running=[prompt(10, computed=8)], waiting=[prompt(3), prompt(9)], budget=8)
    assert result == StepPlan(prompts=(2,), admitted=(3, 3))


def test_decoding_takes_nothing_from_the_prefill_budget():
    assert plan(running=[decoding(5)] * 5, waiting=[prompt(8)], budget=8).admitted == (8,)


def test_no_more_requests_run_than_allowed():
    assert plan(running=[decoding(5)], waiting=[prompt(1)] * 5, max_running=3).admitted == (1, 1)


def test_a_prompt_that_does_not_fit_waits_and_nobody_overtakes_it():
    result = plan(running=[decoding(5)], waiting=[prompt(40), prompt(1)], available_pages=10, budget=64)
    assert result.admitted == ()


def test_admission_leaves_a_page_for_each_running_request():
    running = [decoding(4), decoding(4)]  # both are about to need their second page
    assert plan(running=running, waiting=[prompt(8)], available_pages=5).admitted == ()
    assert plan(running=running, waiting=[prompt(8)], available_pages=6).admitted == (8,)


def test_without_running_requests_a_prompt_may_take_every_page():
    assert plan(waiting=[prompt(8)], available_pages=2).admitted == (8,)


def test_of_a_prompt_only_what_is_not_cached_is_computed_and_counts_for_the_budget():
    assert plan(waiting=[prompt(20, computed=16), prompt(9, computed=4)], budget=8).admitted == (4, 4)


def test_pages_that_running_requests_hold_already_need_not_be_available():
    shared = RequestView(computed=8, remaining=4, pages=2)
    assert plan(waiting=[shared], available_pages=1).admitted == (4,)
    assert plan(waiting=[shared._replace(pages=0)], available_pages=1).admitted == ()


def test_when_pages_run_out_the_last_gives_way_before_anything_else_happens():
    running = [decoding(4), decoding(4), decoding(4)]  # each needs one more page
    assert plan(running, waiting=[prompt(1)], available_pages=2) == StepPlan(retracts=True)
    assert settled_plan(running, available_pages=1) == (StepPlan(), 2)


def test_the_last_one_standing_retracts_itself_only_when_it_cannot_grow():
    assert plan(running=[decoding(4)], available_pages=0).retracts
    assert not plan(running=[decoding(4)], available_pages=1).retracts


views = st.builds(
    lambda computed, remaining: RequestView(computed, remaining, pages_for(computed, PAGE)),
    computed=st.integers(0, 60),
    remaining=st.one_of(st.just(1), st.integers(1, 60)),
)


@given(
    running=st.lists(views, max_size=8),
    waiting=st.lists(st.builds(prompt, st.integers(21, 60), st.sampled_from([0, 4, 20])), max_size=8),
    available_pages=st.integers(0, 60),
    budget=st.integers(1, 40),
)
def test_a_plan_never_exceeds_pages_budget_or_slots(running, waiting, available_pages, budget):
    max_running = 8
    result = plan(running, waiting, available_pages, budget, max_running)
    assert result == StepPlan(retracts=True) or not result.retracts
    assert len(running) + len(result.admitted) <= max_running
    if result.retracts:
        return
    available = available_pages
    prompts = [request for request in running if request.remaining > 1]
    for request, tokens in zip(prompts, result.prompts, strict=True):
        assert 0 <= tokens <= request.remaining
        available -= pages_for(request.computed + tokens, PAGE) - request.pages
    for request in running:
        if request.remaining == 1:
            available -= pages_for(request.computed + 1, PAGE) - request.pages
    for request, tokens in zip(waiting, result.admitted, strict=False):
        assert 1 <= tokens <= request.remaining
        available -= pages_for(request.computed + tokens, PAGE) - request.pages
    assert available >= 0
    assert sum(result.prompts) + sum(result.admitted) <= budget


@given(running=st.lists(views, min_size=1, max_size=8), available_pages=st.integers(16, 60), budget=st.integers(1, 40))
def test_the_oldest_request_always_gets_on(running, available_pages, budget):
    result, left = settled_plan(running, available_pages, budget)
    assert left >= 1
    assert running[0].remaining == 1 or result.prompts[0] >= 1


# Whose turn it is


def test_the_longest_cached_prefix_goes_first_and_equals_in_order_of_arrival():
    claims = [Claim(False, 0, cached) for cached in (0, 8, 16, 8)]
    assert admission_order(claims) == [2, 1, 3, 0]


def test_priority_goes_before_prefix_and_an_overdue_request_before_both():
    claims = [Claim(False, 0, 16), Claim(False, 5, 0), Claim(True, -5, 0), Claim(True, 9, 99)]
    assert admission_order(claims) == [2, 3, 1, 0]
