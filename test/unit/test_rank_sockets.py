"""How messages reach the ranks of an attention group: all of them at the same step, whenever they arrive."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import msgspec
import pytest
import zmq

from nibble.config.parallel_config import ParallelConfig
from nibble.ipc.messages import (
    AbortRequest,
    FlushCache,
    FromRank,
    RankReady,
    RankStage,
    Wake,
    engine_address,
    rank_address,
)
from nibble.scheduler.rank_sockets import RankSockets

PAIRS = ParallelConfig(tp_size=4, dp_size=2, enable_dp_attention=True)


class Engine:
    """The engine's end of the sockets."""

    def __init__(self, run_dir: Path, parallel: ParallelConfig) -> None:
        self.context = zmq.Context()
        self.inbox = self.context.socket(zmq.PULL)
        self.inbox.bind(engine_address(run_dir))
        self.ranks = [RankSockets(run_dir, rank, parallel) for rank in range(parallel.world_size)]
        self.to_groups = [self.context.socket(zmq.PUSH) for _ in range(parallel.dp_size)]
        for dp_rank, socket in enumerate(self.to_groups):
            socket.connect(rank_address(run_dir, parallel.first_rank(dp_rank)))

    def send(self, dp_rank: int, message: object) -> None:
        self.to_groups[dp_rank].send(msgspec.msgpack.encode(message))

    def received(self) -> list[FromRank]:
        decoder, messages = msgspec.msgpack.Decoder(FromRank), []
        while self.inbox.poll(200):
            messages.append(decoder.decode(self.inbox.recv()))
        return messages

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
        self.context.destroy(linger=0)


@pytest.fixture
def engine(tmp_path) -> Iterator[Engine]:
    engine = Engine(tmp_path, PAIRS)
    yield engine
    engine.close()


def test_at_every_step_the_ranks_of_a_group_have_the_same_messages_whenever_they_arrive(engine):
    """A rank that reads an abort one step before its peer schedules other rows, and both wait for each other."""
    sent = [AbortRequest(f"r{number}") if number % 3 else Wake(number) for number in range(300)]
    seen: list[list[list[object]]] = [[], []]

    def run(rank: int) -> None:
        while not seen[rank] or FlushCache() not in seen[rank][-1]:
            seen[rank].append(engine.ranks[rank].receive(wait=False))
            time.sleep(random.random() / 2000)

    threads = [Thread(target=run, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for number, message in enumerate([*sent, FlushCache()]):
        engine.send(0, message)
        if number % 10 == 0:
            time.sleep(0.001)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert seen[0] == seen[1]
    assert [message for step in seen[0] for message in step] == [*sent, FlushCache()]


def test_a_group_that_sleeps_wakes_together_and_the_other_group_sleeps_on(engine):
    woken: dict[int, list[object]] = {}

    def sleep(rank: int) -> None:
        woken[rank] = engine.ranks[rank].receive(wait=True)

    threads = [Thread(target=sleep, args=(rank,), daemon=True) for rank in range(4)]
    for thread in threads:
        thread.start()
    engine.send(1, Wake(7))
    for thread in threads[2:]:
        thread.join(10)
    assert woken == {2: [Wake(7)], 3: [Wake(7)]}
    engine.send(0, Wake(8))
    for thread in threads[:2]:
        thread.join(10)
    assert woken[0] == woken[1] == [Wake(8)]


def test_only_the_first_rank_of_a_group_answers_and_every_rank_says_how_it_is(engine):
    for number, rank in enumerate(engine.ranks):
        rank.answer(RankStage(number, "answer"))
        rank.send(RankReady(number, None))
    messages = engine.received()
    assert sorted(message.rank for message in messages if isinstance(message, RankStage)) == [0, 2]
    assert sorted(message.rank for message in messages if isinstance(message, RankReady)) == [0, 1, 2, 3]
