"""How late the event loop is: what every request and every stream of this process waits in addition."""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.02


async def watch_event_loop(on_lag: Callable[[float], None]) -> None:
    """Tells, forever and for every INTERVAL_S, how many seconds later than asked for a task was woken.

    Who is due during a long delay is told of as well, so that it weighs as long as it lasts.
    """
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due += INTERVAL_S
        await asyncio.sleep(due - loop.time())
        woken = loop.time()
        on_lag(max(0.0, woken - due))
        while due + INTERVAL_S <= woken:
            due += INTERVAL_S
            on_lag(woken - due)
