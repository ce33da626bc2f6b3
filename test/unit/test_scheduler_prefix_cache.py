"""What the scheduler reuses of prompts and answers before, what it gives up first, and what is never reused."""

import pytest

from nibble.kv_cache.radix_cache import encode_tokens
from scheduler_cases import PAGE, finish, make_request, make_scheduler, run


@pytest.mark.parametrize(
    ("prompt", "cached"),
    [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8)],
)
def test_of_a_prompt_seen_before_whole_pages_are_reused_and_at_least_the_last_token_is_computed(prompt, cached):
    scheduler = make_scheduler()
    assert run(scheduler, make_request("first", prompt, max_new_tokens=1)) == prompt
    again = make_request("again", prompt, max_new_tokens=1)
    assert run(scheduler, again) == prompt - cached
    assert again.cached_tokens == cached


def test_without_reuse_every_prompt_is_computed_and_every_page_is_freed():
    scheduler = make_scheduler(reuse=False)
    for name in ("first", "again"):
        request = make_request(name, prompt=9, max_new_tokens=3)
        assert run(scheduler, request) == 11
        assert request.cached_tokens == 0
        assert scheduler.kv.allocator.num_used == 0


def test_the_next_turn_of_a_conversation_reuses_the_answer_too():
    scheduler = make_scheduler()
    first = make_request("first", prompt=6, max_new_tokens=7)
    run(scheduler, first)
    second = make_request("second", [*first.token_ids, 20, 21, 22], max_new_tokens=1)
    run(scheduler, second)
    assert second.cached_tokens == 12  # 6 and 7 tokens, of which the last was never computed


def test_running_requests_share_the_pages_of_a_prompt_as_soon_as_it_is_computed():
    scheduler = make_scheduler()
    first, second = (make_request(name, prompt=9, max_new_tokens=9) for name in ("first", "second"))
    scheduler.add(first)
    for _ in range(2):  # chunks of 8 and 1 tokens
        finish(scheduler, scheduler.schedule())
    scheduler.add(second)
    step = scheduler.schedule()
    assert second.pages[:2] == first.pages[:2]
    assert second.pages[2] != first.pages[2], "what they write is their own"
    assert second.cached_tokens == 8
    finish(scheduler, step)
    shared = first.pages[:2]
    scheduler.abort("first")
    assert second.pages[:2] == shared
    assert run(scheduler) == 8
    assert second.num_generated == 9


def test_equal_prompts_that_were_computed_at_the_same_time_end_up_on_the_same_pages():
    scheduler = make_scheduler()
    requests = [make_request(name, prompt=4, max_new_tokens=9) for name in ("a", "b")]
    for request in requests:
        scheduler.add(request)
    step = scheduler.schedule()
    assert requests[0].pages != requests[1].pages
    finish(scheduler, step)
    assert requests[0].pages == requests[1].pages
    assert scheduler.kv.allocator.num_used == 1


def test_cached_pages_are_given_up_before_a_request_is():
    scheduler = make_scheduler(num_pages=8)
    run(scheduler, make_request("old", [30] * 28, max_new_tokens=1))
    assert scheduler.kv.cache.num_pages == 7
    run(scheduler, make_request("new", prompt=20, max_new_tokens=8))
    assert scheduler.num_retracted == 0
    assert scheduler.kv.cache.match(encode_tokens([30] * 28)).pages == 1
    assert scheduler.kv.cache.match(encode_tokens(range(1, 21))).pages == 5


def test_a_prefix_that_a_request_is_admitted_with_is_not_evicted_to_make_room_for_it():
    scheduler = make_scheduler(num_pages=8, budget=32)
    run(scheduler, make_request("old", prompt=17, max_new_tokens=1))
    run(scheduler, make_request("newer", [30] * 16, max_new_tokens=1))
    assert scheduler.kv.num_available == 8 and scheduler.kv.allocator.num_free == 0
    request = make_request("a", prompt=30, max_new_tokens=1)
    assert run(scheduler, request) == 14
    assert request.cached_tokens == 16


def test_a_retracted_request_computes_again_only_what_is_no_longer_cached():
    scheduler = make_scheduler(num_pages=7, max_running=2)
    old = make_request("old", [*range(1, 9)], max_new_tokens=9)
    young = make_request("young", [*range(11, 19)], max_new_tokens=9)
    scheduler.add(old)
    scheduler.add(young)
    while not scheduler.num_retracted:
        finish(scheduler, scheduler.schedule())
    assert scheduler.running == [old]
    assert scheduler.kv.match(young).pages == 3
    while young in scheduler.waiting:
        cached = scheduler.kv.match(young).pages
        step = scheduler.schedule()
        entries = [entry for entry in step if entry.request is young]
        finish(scheduler, step)
    assert cached > 0
    assert [entry.num_tokens for entry in entries] == [young.num_computed - cached * PAGE]
    run(scheduler)
    assert (old.num_generated, young.num_generated) == (9, 9)
    assert young.cached_tokens == 0, "what it found when it came for the first time"


def test_what_a_failed_request_computed_is_not_reused():
    scheduler = make_scheduler()
    scheduler.add(make_request("bad", prompt=6, max_new_tokens=5))
    finish(scheduler, scheduler.schedule(), None)
    assert scheduler.kv.cache.num_pages == 0
    scheduler.check_idle()


def test_what_an_aborted_request_computed_is_reused_if_a_token_has_shown_it_to_be_finite():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", prompt=13, max_new_tokens=5))
    finish(scheduler, scheduler.schedule())
    pages = set(scheduler.running[0].pages)
    scheduler.abort("a")
    assert set(scheduler.take_dirty_pages()) == pages, "of half a prompt nothing is known"
    assert scheduler.kv.cache.num_pages == 0
    scheduler.add(make_request("b", prompt=6, max_new_tokens=5))
    finish(scheduler, scheduler.schedule())
    scheduler.abort("b")
    assert scheduler.take_dirty_pages() == []
    assert scheduler.kv.cache.num_pages == 1


def test_flushing_forgets_what_no_running_request_uses():
    scheduler = make_scheduler()
    run(scheduler, make_request("ended", [30] * 9, max_new_tokens=1))
    running = make_request("running", prompt=8, max_new_tokens=9)
    scheduler.add(running)
    finish(scheduler, scheduler.schedule())
    scheduler.flush_cache()
    assert scheduler.kv.cache.num_pages == 2
    run(scheduler)
    scheduler.flush_cache()
    assert scheduler.kv.allocator.num_used == 0
    again = make_request("again", prompt=8, max_new_tokens=1)
    run(scheduler, again)
    assert again.cached_tokens == 0
