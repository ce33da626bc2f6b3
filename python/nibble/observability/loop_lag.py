"""How late the event loop is: what every request and every stream of this process waits in addition."""

import asyncio
from collections.abc import Callable

INTERVAL_S = 0.02


async def watch_event_loop(on_lag: Callable[[float], None]) -> None:
    """Tells, forever, how many seconds later than asked for this task was woken."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        on_lag(max(0.0, loop.time() - due))
