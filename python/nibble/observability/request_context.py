"""The HTTP request that is being served: its id, which the logs carry and the answer returns."""

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

_LONGEST_ID = 128
_UNSAFE = re.compile(r"[^A-Za-z0-9._:/+=@-]")


def sanitized_id(text: str) -> str:
    """An id from a client as logs and headers can hold it: at most 128 characters, unusual ones as `_`."""
    return _UNSAFE.sub("_", text[:_LONGEST_ID])


@dataclass
class RequestContext:
    """One HTTP request. `request_id` is the client's, of the header `x-request-id`, if it sent one."""

    client_request_id: str | None = None
    request_id: str = field(init=False)
    unique_id: str = field(init=False)
    """Holds `request_id`, and differs from that of every other request, also when a client repeats its ids."""
    received_at: float = field(init=False, default_factory=time.monotonic)

    def __post_init__(self) -> None:
        unique = uuid.uuid4().hex
        given = sanitized_id(self.client_request_id or "")
        self.request_id, self.unique_id = (given, f"{given}-{unique}") if given else (unique, unique)

    def use_rid(self, rid: str) -> None:
        """Takes the `rid` of the body where no header has brought an id."""
        if not self.client_request_id:
            self.request_id = sanitized_id(rid)


current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)


def unique_request_id() -> str:
    """An id for what the engine generates for the current request; one that holds the id of that request."""
    context = current_request.get()
    return uuid.uuid4().hex if context is None else context.unique_id
