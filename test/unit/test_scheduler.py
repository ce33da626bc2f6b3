"""The books of one rank: no token lost or repeated, no page leaked, whatever arrives in whatever order."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nibble.ipc.messages import NewRequest
from nibble.kv_cache.allocator import PageAllocator
from nibble.sampling_params import SamplingParams
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import ScheduledRequest, Scheduler, SchedulerLimits

EOS = 0
CONTEXT = 32
PAGE = 4


def make_scheduler(num_pages: int = 16, budget: int = 8, max_running: int = 4) -> Scheduler:
    limits = SchedulerLimits(PAGE, budget, max_running, CONTEXT, frozenset({EOS}))
    return Scheduler(limits, num_pages)


def make_request(name: str, prompt: int, max_new_tokens: int, **sampling: object) -> Request:
    params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
    return Request(NewRequest(1, name, list(range(1, prompt + 1)), params, 0, False, 0, 1))


def finish(scheduler: Scheduler, step: Sequence[ScheduledRequest], token: int | None = 7) -> list[object]:
    return list(scheduler.finish_step(step, [token for entry in step if entry.samples]))


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
    reasons = scheduler.finish_step(step, [None, 7])
    assert reasons[0].type == "abort" and reasons[1] is None
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


def test_a_leaked_page_is_found_at_idle():
    scheduler = make_scheduler()
    scheduler.allocator.allocate(1)
    with pytest.raises(RuntimeError, match="1 KV pages leaked"):
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


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, steps, aborts and failed rows, against the plain expectation of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(num_pages=9, budget=5, max_running=3)
        self.live: dict[str, Request] = {}
        self.expected: dict[str, list[int]] = {}
        self.count = 0

    @rule(prompt=st.integers(1, 20), max_new_tokens=st.integers(1, 12))
    def arrive(self, prompt, max_new_tokens):
        self.count += 1
        request = make_request(f"r{self.count}", prompt, max_new_tokens)
        self.live[request.request_id] = request
        self.expected[request.request_id] = list(request.token_ids)
        self.scheduler.add(request)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.scheduler.abort(name)
        del self.live[name]

    @rule(data=st.data())
    def step(self, data):
        step = self.scheduler.schedule()
        assert bool(step) == bool(self.live), "there is a step exactly when there is work"
        sampling = [entry.request for entry in step if entry.samples]
        tokens = data.draw(st.lists(st.sampled_from([EOS, 5, 6, None]), min_size=len(sampling), max_size=len(sampling)))
        reasons = self.scheduler.finish_step(step, tokens)
        for request, token, reason in zip(sampling, tokens, reasons, strict=True):
            if token is not None:
                self.expected[request.request_id].append(token)
            if reason is not None:
                assert token in (None, EOS) or request.num_generated == request.sampling.max_new_tokens
                del self.live[request.request_id]
        self.scheduler.take_dirty_pages()

    @invariant()
    def every_request_is_somewhere_with_its_own_tokens_and_pages(self):
        known = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(request.request_id for request in known) == sorted(self.live)
        for name, request in self.live.items():
            assert request.token_ids == self.expected[name]
        pages = [page for request in known for page in request.pages]
        assert len(pages) == len(set(pages)) == self.scheduler.allocator.num_used

    def teardown(self):
        for _ in range(2000):
            if self.scheduler.is_idle:
                break
            finish(self.scheduler, self.scheduler.schedule())
        assert self.scheduler.is_idle, "every accepted request ends"
        self.scheduler.check_idle()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(6)))
def test_requests_start_in_the_order_of_arrival(order):
    scheduler = make_scheduler(num_pages=64, budget=4, max_running=2)
    for index in order:
        scheduler.add(make_request(str(index), prompt=3 + index, max_new_tokens=2))
    started: list[str] = []
    while not scheduler.is_idle:
        step = scheduler.schedule()
        started += [r.request_id for r in scheduler.running if r.request_id not in started]
        finish(scheduler, step)
    assert started == [str(index) for index in order]
