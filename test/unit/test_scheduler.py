"""The books of one rank: no token lost or repeated, no page leaked, whatever arrives in whatever order."""

import os
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nibble.ipc.messages import NewRequest
from nibble.kv_cache.allocator import PageAllocator
from nibble.kv_cache.radix_cache import Node, encode_tokens
from nibble.sampling_params import SamplingParams
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import PENDING, ScheduledRequest, Scheduler, SchedulerLimits

EOS = 0
CONTEXT = 32
PAGE = 4


def make_scheduler(
    num_pages: int = 16, budget: int = 8, max_running: int = 4, reuse: bool = True, **limits: Any
) -> Scheduler:
    limits = SchedulerLimits(PAGE, budget, max_running, CONTEXT, frozenset({EOS}), reuse, **limits)
    return Scheduler(limits, num_pages)


def make_request(
    name: str, prompt: int | Sequence[int], max_new_tokens: int, priority: int = 0, **sampling: object
) -> Request:
    """A request with this prompt, or one of that many tokens 1, 2, 3, …"""
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
    tokens = list(range(1, prompt + 1)) if isinstance(prompt, int) else list(prompt)
    return Request(NewRequest(1, name, tokens, params, 0, False, 0, 1, priority))


def finish(scheduler: Scheduler, step: Sequence[ScheduledRequest], token: int | None = 7) -> list[object]:
    scheduler.begin_step(step)
    return [booked.reason for booked in scheduler.finish_step(step, [token for entry in step if entry.samples])]


def run(scheduler: Scheduler, *requests: Request) -> int:
    """Runs these requests, and those that are there already, to their ends. Returns the tokens it computed."""
    computed = 0
    for request in requests:
        scheduler.add(request)
    while not scheduler.is_idle:
        step = scheduler.schedule()
        computed += sum(entry.num_tokens for entry in step)
        finish(scheduler, step)
    scheduler.check_idle()
    return computed


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


def start_order(scheduler: Scheduler) -> list[str]:
    """The names of requests as they start, until all have ended."""
    started: list[str] = []
    while not scheduler.is_idle:
        step = scheduler.schedule()
        started += [r.request_id for r in scheduler.running if r.request_id not in started]
        finish(scheduler, step)
    scheduler.check_idle()
    return started


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


def begin(scheduler: Scheduler) -> list[ScheduledRequest]:
    step = scheduler.schedule()
    assert step is not None
    scheduler.begin_step(step)
    return step


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


# The prefix cache


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


NAN = "NaN"
CLEARED = None


class Memory:
    """The KV cache of a model whose keys say what they depend on: all tokens up to theirs."""

    def __init__(self, num_pages: int) -> None:
        self.slots: list[object] = [CLEARED] * (num_pages * PAGE)

    def clear(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.slots[page * PAGE : (page + 1) * PAGE] = [CLEARED] * PAGE

    def forward(self, entry: ScheduledRequest, tokens: Sequence[int], produces_nan: bool) -> bool:
        """Writes the keys of a step, checks all that it attends to, and returns whether the logits are finite.

        `tokens` are the request's as the device knows them.
        """
        request, end = entry.request, entry.start + entry.num_tokens
        slots = [page * PAGE + offset for page in request.pages for offset in range(PAGE)]
        assert entry.start >= request.num_shared * PAGE, "pages that others share are never written"
        for position in range(entry.start, end):
            self.slots[slots[position]] = NAN if produces_nan else tuple(tokens[: position + 1])
        read = [self.slots[slot] for slot in slots[:end]]
        expected = [tuple(tokens[: position + 1]) for position in range(end)]
        assert all(found in (NAN, right) for found, right in zip(read, expected, strict=True))
        return NAN not in (self.slots[slot] for slot in slots)  # attention multiplies masked slots by zero


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps, aborts, flushes and failures, against the plain expectation of each request.

    Where steps overlap, each is begun before the tokens of the one before are known.
    """

    reuse = True
    overlaps = False
    policy = "fcfs"

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(
            num_pages=9, budget=5, max_running=3, reuse=self.reuse, policy=self.policy, max_overtakes=3
        )
        self.memory = Memory(9)
        self.unfinished: tuple[list[ScheduledRequest], list[int | None]] | None = None
        self.device: dict[str, list[int]] = {}
        """The tokens of each request as the device knows them."""
        self.live: dict[str, Request] = {}
        self.expected: dict[str, list[int]] = {}
        self.failing: set[str] = set()
        self.seen: list[list[int]] = [[]]
        self.count = 0

    @rule(data=st.data(), max_new_tokens=st.integers(1, 12))
    def arrive(self, data, max_new_tokens):
        """Some go on with what an earlier request had."""
        beginning = data.draw(st.sampled_from(self.seen))[: data.draw(st.integers(0, 20))]
        more = data.draw(st.lists(st.integers(5, 6), min_size=not beginning, max_size=22 - len(beginning)))
        self.count += 1
        priority = data.draw(st.integers(0, 1))
        request = make_request(f"r{self.count}", beginning + more, max_new_tokens, priority)
        self.device[request.request_id] = list(request.token_ids)
        self.live[request.request_id] = request
        self.expected[request.request_id] = list(request.token_ids)
        self.scheduler.add(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.scheduler.abort(name)
        self.forget(name)

    @rule()
    def flush(self):
        self.scheduler.flush_cache()

    @rule(data=st.data(), may_admit=st.sampled_from([True, True, True, False]))
    def step(self, data, may_admit):
        step = self.scheduler.schedule(may_admit)
        if step is None:
            assert self.overlaps, "only a token that is not known keeps a request from being retracted"
            self.finish()
            step = self.scheduler.schedule(may_admit)
        if not self.unfinished and may_admit:
            assert bool(step) == bool(self.live), "there is a step exactly when there is work"
        self.memory.clear(self.scheduler.take_dirty_pages())
        begun = step, self.run_on_device(data, step)
        self.scheduler.begin_step(step)
        self.finish()
        self.unfinished = begun
        if not self.overlaps:
            self.finish()

    def run_on_device(self, data, step) -> list[int | None]:
        tokens: list[int | None] = []
        for entry in step:
            name = entry.request.request_id
            if data.draw(st.integers(0, 9)) == 9:
                self.failing.add(name)
            finite = self.memory.forward(entry, self.device[name], produces_nan=name in self.failing)
            assert finite == (name not in self.failing), "who fails, fails by itself"
            if entry.samples:
                tokens.append(data.draw(st.sampled_from([EOS, 5, 6])) if finite else None)
                self.device[name].append(tokens[-1] or 0)
        return tokens

    def finish(self) -> None:
        if self.unfinished is None:
            return
        (step, tokens), self.unfinished = self.unfinished, None
        booked = self.scheduler.finish_step(step, tokens)
        sampling = [entry.request for entry in step if entry.samples]
        assert [sampling[token.row] for token in booked] == [token.request for token in booked]
        assert {token.request.request_id for token in booked} == {r.request_id for r in sampling} & self.live.keys()
        for row, request, reason in booked:
            if tokens[row] is not None:
                self.expected[request.request_id].append(tokens[row])
            assert request.cached_tokens < request.prompt_length
            if reason is not None:
                assert tokens[row] in (None, EOS) or request.num_generated == request.sampling.max_new_tokens
                assert request.token_ids == self.expected[request.request_id]
                self.forget(request.request_id)

    def forget(self, name: str) -> None:
        self.live.pop(name)
        self.seen.append(self.expected[name])

    @invariant()
    def every_request_is_somewhere_with_its_own_tokens(self):
        known = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(request.request_id for request in known) == sorted(self.live)
        for name, request in self.live.items():
            known = [token for token in request.token_ids if token != PENDING]
            assert known == self.expected[name]
            assert len(request.token_ids) - len(known) <= 1

    @invariant()
    def every_page_is_free_or_cached_or_one_requests_own(self):
        kv = self.scheduler.kv
        in_flight = [entry.request for entry in self.unfinished[0]] if self.unfinished else []
        ended = [request for request in in_flight if request.has_ended]
        known = [*self.scheduler.running, *self.scheduler.waiting, *ended]
        own = [page for request in known for page in request.pages[request.num_shared :]]
        shared = {page for request in known for page in request.pages[: request.num_shared]}
        cached = cached_pages(kv.cache.root)
        assert len({*own, *cached}) == len(own) + len(cached) == kv.allocator.num_used
        assert shared <= set(cached)
        assert kv.cache.num_pages == len(cached)
        assert kv.cache.num_evictable == len(cached) - len(shared)
        assert self.reuse or not cached
        slots = [request.slot for request in (*self.scheduler.running, *ended)]
        assert sorted([*slots, *self.scheduler._free_slots]) == [0, 1, 2]

    def teardown(self):
        self.finish()
        for _ in range(2000):
            if self.scheduler.is_idle:
                break
            finish(self.scheduler, self.scheduler.schedule())
        assert self.scheduler.is_idle, "every accepted request ends"
        self.scheduler.check_idle()


def cached_pages(node: Node) -> list[int]:
    return node.pages + [page for child in node.children.values() for page in cached_pages(child)]


class WithoutReuse(SchedulerMachine):
    reuse = False


class WithOverlap(SchedulerMachine):
    overlaps = True


class LongestPrefixFirst(SchedulerMachine):
    overlaps = True
    policy = "lpm"


EXAMPLES = int(os.environ.get("NIBBLE_SCHEDULER_EXAMPLES", "40"))
"""Each has up to 60 steps; set it to some thousands for an hour's search."""
for machine in (SchedulerMachine, WithoutReuse, WithOverlap, LongestPrefixFirst):
    machine.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=60, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
TestWithoutReuse = WithoutReuse.TestCase
TestWithOverlap = WithOverlap.TestCase
TestLongestPrefixFirst = LongestPrefixFirst.TestCase


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)))
def test_requests_start_in_the_order_of_arrival(order):
    scheduler = make_scheduler(num_pages=64, budget=4, max_running=2)
    for index in order:
        scheduler.add(make_request(str(index), prompt=3 + index, max_new_tokens=2))
    assert start_order(scheduler) == [str(index) for index in order]
