"""Who is next: priority, then age, and nobody is overtaken without end."""

from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.ipc.messages import NewRequest
from nibble.sampling_params import SamplingParams
from nibble.scheduler.request import Request
from nibble.scheduler.waiting_queue import WaitingQueue


def make_request(name: str, priority: int = 0) -> Request:
    return Request(NewRequest(1, name, [1], SamplingParams(), 0, False, 0, 1, priority))


def make_queue(*priorities: int, max_overtakes: int = 100) -> WaitingQueue:
    """Requests named by their numbers."""
    queue = WaitingQueue(max_overtakes)
    for number, priority in enumerate(priorities):
        queue.add(make_request(str(number), priority))
    return queue


def names(queue: WaitingQueue, count: int = 100) -> str:
    return " ".join(request.request_id for request in queue.head(count))


def test_priorities_come_first_and_within_one_the_order_of_arrival():
    queue = make_queue(0, 5, 0, -1, 5)
    assert names(queue) == "1 4 0 2 3"
    assert names(queue, 3) == "1 4 0"
    assert len(queue) == 5


def test_a_request_that_had_its_turn_is_the_next_of_its_priority():
    queue = make_queue(5, 0, 0)
    for name in ("1", "2"):
        queue.remove(name)
    for name in ("2", "1"):  # the youngest gives way first
        queue.put_back(make_request(name))
    queue.add(make_request("new"))
    assert names(queue) == "0 1 2 new"


def test_who_left_is_not_there_and_who_never_was_is_none():
    queue = make_queue(0, 3)
    assert queue.remove("1") is not None
    assert queue.remove("1") is None
    assert queue.remove("never seen") is None
    assert names(queue) == "0"
    queue.remove("0")
    assert len(queue) == 0 and names(queue) == ""


def test_a_request_is_overtaken_no_more_often_than_allowed():
    """A stream of urgent requests must not keep an ordinary one waiting for ever."""
    queue = make_queue(0, max_overtakes=3)
    for number in range(1, 10):
        queue.add(make_request(str(number), priority=9))
    order = []
    while len(queue):
        (request,) = queue.head(1)
        order.append(request.request_id)
        assert queue.is_overdue(request) == (request.request_id == "0")
        queue.remove(request.request_id)
    assert order == ["1", "2", "3", "0", "4", "5", "6", "7", "8", "9"]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_every_request_leaves_after_a_bounded_number_of_others(data, max_overtakes):
    """Whatever comes, and whichever of the first few is chosen, as longest-prefix-match does."""
    queue = WaitingQueue(max_overtakes)
    overtaken: dict[int, int] = {}
    waiting: dict[str, Request] = {}
    for number in range(data.draw(st.integers(1, 40))):
        request = make_request(str(number), data.draw(st.integers(-1, 1)))
        queue.add(request)
        waiting[request.request_id] = request
        overtaken[request.arrival] = 0
        for _ in range(data.draw(st.integers(0, 2))):
            window = queue.head(4)
            if not window:
                break
            overdue = [request for request in window if queue.is_overdue(request)]
            chosen = overdue[0] if overdue else data.draw(st.sampled_from(window))
            queue.remove(chosen.request_id)
            del waiting[chosen.request_id]
            for other in waiting.values():
                overtaken[other.arrival] += other.arrival < chosen.arrival
        assert sorted(request.request_id for request in queue.head(100)) == sorted(waiting)
    assert max(overtaken.values()) <= max_overtakes
