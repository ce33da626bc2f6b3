"""What holds up the event loop of the HTTP process, how that is measured, and what must not do it."""

import asyncio
import gc

import msgspec
import pytest

from fake_engine import BODIES, Api, conversation
from nibble.ipc.messages import FromRank, TokenBatch, TokenUpdate
from nibble.observability import loop_lag


def test_a_long_delay_counts_for_everybody_who_was_due_meanwhile(monkeypatch):
    """A single wake-up that came 70 ms late was one sample among thousands that were on time."""
    now = 0.0
    delays = iter([0.0, 0.07, 0.0])
    lags: list[float] = []

    class Loop:
        def time(self) -> float:
            return now

    async def sleep(seconds: float) -> None:
        nonlocal now
        delay = next(delays, None)
        if delay is None:
            raise asyncio.CancelledError
        now += max(0.0, seconds) + delay

    monkeypatch.setattr(loop_lag.asyncio, "get_running_loop", Loop)
    monkeypatch.setattr(loop_lag.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        loop_lag.watch_event_loop(lags.append).send(None)
    assert lags == pytest.approx([0, 0.07, 0.05, 0.03, 0.01, 0])


@pytest.fixture
def no_collector():
    gc.collect()
    gc.freeze()  # only what the test makes is looked at
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture(scope="module")
def api() -> Api:
    return Api()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("stream", "leaves"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("failing", [False, True])
def test_an_answer_leaves_nothing_that_only_the_garbage_collector_frees(
    api, no_collector, path, stream, leaves, failing
):
    """Which may therefore look rarely: it held up a thousand streams for a third of a second, and found nothing."""
    api.engine.fail_after = 5 if failing else None

    async def converse() -> None:
        leave = asyncio.Event()

        async def send(message: object) -> None:
            if leaves:
                leave.set()

        await conversation(api, path, {**BODIES[path], "stream": stream}, [], leave, send)

    api.run(converse())  # what the first one makes stays
    gc.collect()
    for _ in range(3):
        api.run(converse())
    assert gc.collect() == 0


def test_a_step_of_a_thousand_requests_does_not_set_off_the_garbage_collector(no_collector):
    """Each update was four objects for it, and every step of many streams made it look at all that they hold."""
    updates = [TokenUpdate(f"request {i}", [i], None, (), 0) for i in range(1000)]
    message = msgspec.msgpack.encode(TokenBatch(0, updates))
    decoder = msgspec.msgpack.Decoder(FromRank)
    before = gc.get_count()[0]
    batch = decoder.decode(message)
    counted = gc.get_count()[0] - before
    assert batch.updates == updates
    assert counted < 1.1 * len(updates)  # the lists of their tokens
