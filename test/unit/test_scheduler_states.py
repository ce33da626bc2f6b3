"""Whatever arrives in whatever order: random arrivals, steps, aborts and failures against a plain expectation."""

import os
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nibble.kv_cache.radix_cache import Node
from nibble.scheduler.request import Request
from nibble.scheduler.scheduler import PENDING, ScheduledRequest
from scheduler_cases import EOS, PAGE, finish, make_request, make_scheduler

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
