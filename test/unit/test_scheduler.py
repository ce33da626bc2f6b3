"""The books of one rank: no token lost or repeated, no page leaked."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.kv_cache.allocator import PageAllocator
from nibble.kv_cache.radix_cache import encode_tokens
from scheduler_cases import CONTEXT, EOS, begin, finish, make_request, make_scheduler, run, start_order


def test_a_prompt_longer_than_the_chunk_samples_only_at_its_end():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt=20, max_new_tokens=1))
    chunks = []
    while not scheduler.is_idle:
        step = scheduler.schedule()
        chunks.append((step[0].num_tokens, step[0].samples))
        finish(scheduler, step)
    assert chunks == [(8, False), (8, False), (4, True)]
    scheduler.check_idle()


def test_the_end_of_sequence_token_stops_a_request_unless_it_is_ignored():
    for ignore_eos, tokens in ((False, 1), (True, 3)):
        scheduler = make_scheduler()
        request = make_request("a", prompt=2, max_new_tokens=3, ignore_eos=ignore_eos)
        scheduler.add(request)
        while not scheduler.is_idle:
            reasons = finish(scheduler, scheduler.schedule(), EOS)
        assert request.num_generated == tokens
        assert reasons[0].type == ("length" if ignore_eos else "stop")


def test_a_stop_token_before_min_new_tokens_does_not_stop():
    scheduler = make_scheduler()
    request = make_request("a", prompt=2, max_new_tokens=9, min_new_tokens=3, stop_token_ids=(7,))
    scheduler.add(request)
    while not scheduler.is_idle:
        finish(scheduler, scheduler.schedule(), 7)
    assert request.num_generated == 3


def test_a_request_ends_when_the_context_is_full():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt=CONTEXT - 2, max_new_tokens=9))
    reasons: list[object] = []
    while not scheduler.is_idle:
        reasons = finish(scheduler, scheduler.schedule())
    assert reasons[0].type == "length" and reasons[0].length == 2


def test_a_row_that_is_not_finite_ends_its_own_request_and_nobody_elses():
    scheduler = make_scheduler()
    scheduler.add(make_request("bad", prompt=4, max_new_tokens=5))
    scheduler.add(make_request("good", prompt=4, max_new_tokens=5))
    step = scheduler.schedule()
    pages = set(step[0].request.pages)
    scheduler.begin_step(step)
    bad, good = scheduler.finish_step(step, [None, 7])
    assert bad.reason.type == "abort" and good.reason is None
    assert [request.request_id for request in scheduler.running] == ["good"]
    assert set(scheduler.take_dirty_pages()) == pages, "its pages may hold NaN and must be cleared"
    assert scheduler.take_dirty_pages() == []


def test_a_retracted_request_goes_on_where_it_was():
    scheduler = make_scheduler(num_pages=8, max_running=8)
    requests = [make_request(name, prompt=8, max_new_tokens=12) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    for _ in range(200):
        if scheduler.is_idle:
            break
        finish(scheduler, scheduler.schedule())
    assert scheduler.num_retracted > 0
    assert [request.num_generated for request in requests] == [12, 12, 12]
    scheduler.check_idle()


def test_aborting_frees_pages_of_running_and_forgets_waiting_requests():
    scheduler = make_scheduler(max_running=1)
    scheduler.add(make_request("running", prompt=4, max_new_tokens=5))
    scheduler.add(make_request("waiting", prompt=4, max_new_tokens=5))
    finish(scheduler, scheduler.schedule())
    scheduler.abort("waiting")
    scheduler.abort("running")
    scheduler.abort("never seen")
    assert scheduler.is_idle
    scheduler.check_idle()


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)))
def test_requests_start_in_the_order_of_arrival(order):
    scheduler = make_scheduler(num_pages=64, budget=4, max_running=2)
    for index in order:
        scheduler.add(make_request(str(index), prompt=3 + index, max_new_tokens=2))
    assert start_order(scheduler) == [str(index) for index in order]


def test_higher_priorities_start_first_and_are_retracted_last():
    scheduler = make_scheduler(num_pages=8, max_running=2)
    for name, priority in (("low", 0), ("high", 1), ("highest", 2)):
        scheduler.add(make_request(name, prompt=[priority + 1] * 8, max_new_tokens=12, priority=priority))
    assert start_order(scheduler) == ["highest", "high", "low"]

    scheduler = make_scheduler(num_pages=8, max_running=2)
    scheduler.add(make_request("low", prompt=8, max_new_tokens=12, priority=0))
    finish(scheduler, scheduler.schedule())
    scheduler.add(make_request("high", prompt=[30] * 8, max_new_tokens=12, priority=1))
    while not scheduler.num_retracted:
        finish(scheduler, scheduler.schedule())
    assert [request.request_id for request in scheduler.running] == ["high"]
    assert start_order(scheduler) == ["high", "low"]


def test_the_longest_cached_prefix_is_admitted_first_under_lpm_only():
    for policy, expected in (("lpm", ["long", "short", "none"]), ("fcfs", ["none", "short", "long"])):
        scheduler = make_scheduler(max_running=1, policy=policy)
        run(scheduler, make_request("cached", prompt=17, max_new_tokens=1))
        for name, prompt in (("none", [30] * 8), ("short", [*range(1, 9), 30]), ("long", [*range(1, 17), 30])):
            scheduler.add(make_request(name, prompt, max_new_tokens=1))
        assert start_order(scheduler) == expected


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_nobody_starves_behind_a_stream_of_more_urgent_or_better_cached_requests(policy):
    scheduler = make_scheduler(num_pages=12, max_running=2, policy=policy, max_overtakes=5)
    favoured = list(range(1, 9))
    run(scheduler, make_request("cached", favoured, max_new_tokens=1))
    victim = make_request("victim", [30] * 8, max_new_tokens=12, priority=0)
    for count in range(100):
        if count == 3:
            scheduler.add(victim)
        scheduler.add(make_request(f"r{count}", favoured, max_new_tokens=4, priority=1 if policy == "fcfs" else 0))
        finish(scheduler, scheduler.schedule())
        if victim.num_generated == 12:
            break
    assert victim.num_generated == 12, "although one more favoured request came with every step"
    overtakers = sum(request.arrival > victim.arrival for request in scheduler.running)
    assert overtakers <= 2


def test_a_step_that_may_not_admit_says_how_many_are_ready():
    scheduler = make_scheduler(max_running=3)
    scheduler.add(make_request("running", prompt=3, max_new_tokens=9))
    finish(scheduler, scheduler.schedule())
    for number in range(4):
        scheduler.add(make_request(str(number), prompt=[number] * 3, max_new_tokens=2))
    step = scheduler.schedule(may_admit=False)
    assert [entry.request.request_id for entry in step] == ["running"]
    assert scheduler.num_ready == 2, "there are slots for two"
    finish(scheduler, step)
    assert len(scheduler.schedule()) == 3


def test_a_leaked_page_is_found_at_idle():
    scheduler = make_scheduler()
    scheduler.kv.allocator.allocate(1)
    with pytest.raises(RuntimeError, match="1 KV pages leaked"):
        scheduler.check_idle()


def test_a_leaked_slot_is_found_at_idle():
    scheduler = make_scheduler()
    scheduler._free_slots.pop()
    with pytest.raises(RuntimeError, match="1 request slots leaked"):
        scheduler.check_idle()


def test_a_prefix_that_is_still_held_is_found_at_idle():
    scheduler = make_scheduler()
    run(scheduler, make_request("a", prompt=5, max_new_tokens=1))
    scheduler.kv.cache.acquire(encode_tokens([1, 2, 3, 4]))
    with pytest.raises(RuntimeError, match="1 cached KV pages are still held"):
        scheduler.check_idle()


def test_a_page_is_never_freed_twice():
    allocator = PageAllocator(4)
    pages = allocator.allocate(3)
    allocator.free(pages[:1])
    with pytest.raises(RuntimeError, match="freed twice"):
        allocator.free(pages)
    assert allocator.num_used == 2, "a refused call frees nothing"
    with pytest.raises(RuntimeError, match="3 KV pages wanted, 2 of 4 free"):
        allocator.allocate(3)


# A step begins before the tokens of the one before it are known


def test_a_page_whose_last_token_is_still_on_its_way_is_not_shared_yet():
    """The prompt leaves one place in its page, and the step that fills it may turn out to be NaN."""
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt=7, max_new_tokens=9))
    first, second = begin(scheduler), begin(scheduler)
    scheduler.finish_step(first, [9])
    assert scheduler.kv.cache.num_pages == 1
    scheduler.finish_step(second, [None])
    assert scheduler.kv.cache.num_pages == 1
    assert len(scheduler.take_dirty_pages()) == 1


@pytest.mark.parametrize(("unused_token", "shared"), [(9, 2), (None, 0)])
def test_what_the_one_step_too_many_computed_is_cached_only_if_it_is_finite(unused_token, shared):
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt=7, max_new_tokens=9))
    first, second = begin(scheduler), begin(scheduler)
    (booked,) = scheduler.finish_step(first, [EOS])
    assert booked.reason is not None and booked.request.token_ids == [1, 2, 3, 4, 5, 6, 7, EOS]
    assert scheduler.is_idle and scheduler.kv.allocator.num_free < 16, "its pages are still written"
    assert scheduler.finish_step(second, [unused_token]) == []
    assert scheduler.kv.cache.num_pages == shared
    scheduler.check_idle()


def test_nobody_is_retracted_whose_newest_token_is_not_known():
    """It may be the last: the request would wait for another turn, and end in the queue."""
    scheduler = make_scheduler(num_pages=6, max_running=2)
    old, young = (make_request(name, prompt=[number] * 7, max_new_tokens=9) for number, name in enumerate("ab"))
    scheduler.add(old)
    finish(scheduler, scheduler.schedule())
    scheduler.add(young)
    last = begin(scheduler)
    while (step := scheduler.schedule()) is not None:
        assert len(step) == 2
        scheduler.begin_step(step)
        scheduler.finish_step(last, [5] * sum(entry.samples for entry in last))
        last = step
    scheduler.finish_step(last, [5, EOS])
    assert scheduler.num_retracted == 0
    assert scheduler.running == [old]
    run(scheduler)
