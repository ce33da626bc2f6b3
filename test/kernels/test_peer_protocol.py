"""The protocol of docs/peer_memory.md as a model: ranks in any order of their steps, one store or look at a time."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROUNDS_OF_A_LAYER = ("dispatch", "combine")
WHEN_FAILED = ("tells all", "lets them finish", "keeps to itself")
LAYERS = 6
FAILED = 1000
GARBAGE = -2


class Overwritten(Exception):
    """A rank read what another layer's store had left, or what had not been stored yet."""


class Segments:
    def __init__(self, world_size: int) -> None:
        self.flags = [[0] * world_size for _ in range(world_size)]  # [owner][rank that raises it]
        self.rows = [[-1] * world_size for _ in range(world_size)]  # [owner][rank that brings them]: the layer
        self.results = [-1] * world_size  # [owner]: the layer
        self.summing: set[int] = set()  # ranks past the round of a combine that still read results
        self.failed: set[int] = set()


class RankProgram:
    """What one rank does in `run`; it may be interrupted for any time at each `yield`.

    With `patience` it gives up after so many looks, does `when_failed` and goes on with garbage.
    """

    def __init__(
        self,
        segments: Segments,
        rank: int,
        uses_fp4: Random,
        rounds: tuple[str, ...] = ROUNDS_OF_A_LAYER,
        patience: int | None = None,
        when_failed: tuple[str, ...] = WHEN_FAILED,
    ) -> None:
        self.segments, self.rank, self.uses_fp4 = segments, rank, uses_fp4
        self.rounds, self.patience, self.when_failed = rounds, patience, when_failed
        self.number = 0
        self.peers = list(range(len(segments.flags)))  # where this rank stores

    @property
    def has_failed(self) -> bool:
        return self.rank in self.segments.failed

    def run(self) -> Iterator[None]:
        segments, rank, world = self.segments, self.rank, range(len(self.segments.flags))
        for layer in range(LAYERS):
            fp4 = self.uses_fp4.random() < 0.5  # the same on all ranks
            if fp4:
                for peer in self.peers:
                    segments.rows[peer][rank] = GARBAGE if self.has_failed else layer
                    yield
            if "dispatch" in self.rounds:
                yield from self.meet()
            for peer in world:
                if fp4:
                    self.check(segments.rows[rank][peer], layer, f"rows of {peer}")
                yield
            segments.results[rank] = GARBAGE if self.has_failed else layer
            yield
            if "combine" in self.rounds:
                yield from self.meet()
            segments.summing.add(rank)
            for peer in world:
                self.check(segments.results[peer], layer, f"results of {peer}")
                yield
            segments.summing.discard(rank)

    def meet(self) -> Iterator[None]:
        self.number += 1
        for peer in self.peers:
            self.segments.flags[peer][self.rank] = self.number
            yield
        if self.has_failed:
            return
        flags, looks = self.segments.flags[self.rank], 0
        while min(flags) < self.number and max(flags) < FAILED and (self.patience is None or looks < self.patience):
            looks += 1
            yield
        if min(flags) < self.number or max(flags) >= FAILED:
            yield from self.fail()

    def fail(self) -> Iterator[None]:
        self.segments.failed.add(self.rank)
        if "tells all" in self.when_failed:
            for peer in self.peers:
                self.segments.flags[peer][self.rank] = FAILED
                yield
        while "lets them finish" in self.when_failed and self.segments.summing - self.segments.failed:
            yield
        if "keeps to itself" in self.when_failed:
            self.peers = [self.rank]

    def check(self, found: int, layer: int, what: str) -> None:
        if found != layer and not self.has_failed:
            raise Overwritten(f"rank {self.rank} has {what} of layer {found}, not {layer}")


def run(seed: int, programs: list[RankProgram], late: int | None = None) -> None:
    """Under a random schedule, which lets some ranks run far ahead of others if nothing holds them.

    The rank that is `late` may stop for long, anywhere.
    """
    schedule = Random(seed)
    running = {program.rank: program.run() for program in programs}
    turns_off = 0
    while running:
        rank = schedule.choice(list(running))
        turns_off = max(0, turns_off - 1)
        if rank == late and schedule.random() < 0.02:
            turns_off = schedule.choice((30, 100, 300))
        if rank == late and turns_off and len(running) > 1:
            continue
        for _ in range(schedule.choice((1, 1, 3, 30))):
            try:
                next(running[rank])
            except StopIteration:
                del running[rank]
                break


def run_with_a_late_rank(world_size: int, seed: int, when_failed: tuple[str, ...] = WHEN_FAILED) -> set[int]:
    """The ranks that failed. The others have had the right rows and results in every layer."""
    segments, patience = Segments(world_size), Random(seed).choice((60, 150, 400))
    programs = [
        RankProgram(segments, rank, Random(seed), patience=patience, when_failed=when_failed)
        for rank in range(world_size)
    ]
    run(seed, programs, late=Random(seed + 1).randrange(world_size))
    return segments.failed


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_every_rank_reads_what_was_stored_for_this_layer_whoever_is_slow(world_size: int, seed: int) -> None:
    segments = Segments(world_size)
    run(seed, [RankProgram(segments, rank, Random(seed)) for rank in range(world_size)])
    assert segments.flags == [[2 * LAYERS] * world_size] * world_size


@pytest.mark.parametrize("left", ROUNDS_OF_A_LAYER)
def test_with_either_round_left_out_something_is_overwritten(left: str) -> None:
    def without_the_other(seed: int) -> None:
        segments = Segments(3)
        run(seed, [RankProgram(segments, rank, Random(seed), rounds=(left,)) for rank in range(3)])

    with pytest.raises(Overwritten):
        [without_the_other(seed) for seed in range(50)]


@settings(max_examples=600, deadline=None)
@given(st.integers(2, 5), st.integers(0, 2**32))
def test_whoever_reads_what_a_rank_left_that_gave_up_on_a_late_one_has_failed_too(world_size: int, seed: int) -> None:
    run_with_a_late_rank(world_size, seed)


def test_a_late_rank_comes_in_time_in_some_schedules_and_too_late_in_others() -> None:
    """So that the test above says something."""
    assert {len(run_with_a_late_rank(3, seed)) for seed in range(100)} >= {0, 3}


@pytest.mark.parametrize("left_out", WHEN_FAILED)
def test_with_a_part_of_giving_up_left_out_a_rank_computes_with_garbage_and_does_not_know(left_out: str) -> None:
    rest = tuple(part for part in WHEN_FAILED if part != left_out)
    with pytest.raises(Overwritten):
        [run_with_a_late_rank(3, seed, rest) for seed in range(3000)]
