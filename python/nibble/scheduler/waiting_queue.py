"""Requests that wait on a rank: found by id, by priority and by age, at a cost that does not grow with their number."""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, islice

from nibble.scheduler.request import Request


class WaitingQueue:
    """Higher priorities first, and within one the order of arrival.

    `max_overtakes` bounds how long a request waits for others: when that many which arrived after it have left the
    queue, it is overdue and goes before all that are not.
    """

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._by_priority: dict[int, OrderedDict[str, Request]] = {}
        self._overdue: OrderedDict[str, Request] = OrderedDict()
        self._places: dict[str, OrderedDict[str, Request]] = {}
        """Which of these a request is in."""
        self._by_age: list[tuple[int, str]] = []
        """A heap of (arrival, id) of all that are not overdue, and of some that have left."""
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._places

    def __iter__(self) -> Iterator[Request]:
        """In the order of arrival within a priority, overdue ones first."""
        priorities = sorted(self._by_priority, reverse=True)
        return chain(self._overdue.values(), *(self._by_priority[priority].values() for priority in priorities))

    def add(self, request: Request) -> None:
        request.arrival = self._num_arrived
        self._num_arrived += 1
        self._insert(request)

    def put_back(self, request: Request) -> None:
        """A request that had its turn already, and is the next of its priority."""
        self._insert(request)
        self._places[request.request_id].move_to_end(request.request_id, last=False)

    def remove(self, request_id: str) -> Request | None:
        """The request, which waits no longer; None if it did not."""
        place = self._places.pop(request_id, None)
        if place is None:
            return None
        request = place.pop(request_id)
        if not place and place is not self._overdue:
            del self._by_priority[request.priority]
        return request

    def head(self, count: int) -> list[Request]:
        """The first so many."""
        self._find_overdue()
        return list(islice(self, count))

    def is_overdue(self, request: Request) -> bool:
        return self._places.get(request.request_id) is self._overdue

    def _insert(self, request: Request) -> None:
        place = self._by_priority.setdefault(request.priority, OrderedDict())
        place[request.request_id] = request
        self._places[request.request_id] = place
        heapq.heappush(self._by_age, (request.arrival, request.request_id))

    def _find_overdue(self) -> None:
        """Of all that left the queue, at most `arrival` came before a request, and the others overtook it."""
        num_left = self._num_arrived - len(self._places)
        while self._by_age:
            arrival, request_id = self._by_age[0]
            if request_id in self._places and num_left - arrival < self._max_overtakes:
                return
            heapq.heappop(self._by_age)
            request = self.remove(request_id)
            if request is not None:
                self._overdue[request_id] = request
                self._places[request_id] = self._overdue
