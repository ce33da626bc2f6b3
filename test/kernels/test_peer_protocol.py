"""The protocol of docs/peer_memory.md as a model: ranks in any order of their steps, one store or look at a time."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROUNDS_OF_A_LAYER = ("dispatch", "combine")


class Overwritten(Exception):
    """A rank read what another layer's store had left, or what had not been stored yet."""


class Segments:
    def __init__(self, world_size: int) -> None:
        self.flags = [[0] * world_size for _ in range(world_size)]  # [owner][rank that raises it]
        self.rows = [[-1] * world_size for _ in range(world_size)]  # [owner][rank that brings them]: the layer
        self.results = [-1] * world_size  # [owner]: the layer


def rank_program(
    segments: Segments, rank: int, layers: int, uses_fp4: Random, rounds: tuple[str, ...]
) -> Iterator[None]:
    """What one rank does; it may be interrupted for any time at each `yield`."""
    world = range(len(segments.flags))
    number = 0

    def meet() -> Iterator[None]:
        nonlocal number
        number += 1
        for peer in world:
            segments.flags[peer][rank] = number
            yield
        while min(segments.flags[rank]) < number:
            yield

    for layer in range(layers):
        fp4 = uses_fp4.random() < 0.5  # the same on all ranks
        if fp4:
            for peer in world:
                segments.rows[peer][rank] = layer
                yield
        if "dispatch" in rounds:
            yield from meet()
        for peer in world:
            if fp4 and segments.rows[rank][peer] != layer:
                raise Overwritten(f"rank {rank} has rows of {peer} of layer {segments.rows[rank][peer]}, not {layer}")
            yield
        segments.results[rank] = layer
        yield
        if "combine" in rounds:
            yield from meet()
        for peer in world:
            if segments.results[peer] != layer:
                raise Overwritten(f"rank {rank} has results of layer {segments.results[peer]} of {peer}, not {layer}")
            yield


def run(world_size: int, seed: int, rounds: tuple[str, ...] = ROUNDS_OF_A_LAYER) -> Segments:
    """Six layers under a random schedule, which lets some ranks run far ahead of others if nothing holds them."""
    segments, schedule = Segments(world_size), Random(seed)
    running = {rank: rank_program(segments, rank, 6, Random(seed), rounds) for rank in range(world_size)}
    while running:
        rank = schedule.choice(list(running))
        for _ in range(schedule.choice((1, 1, 3, 30))):
            try:
                next(running[rank])
            except StopIteration:
                del running[rank]
                break
    return segments


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**32))
def test_every_rank_reads_what_was_stored_for_this_layer_whoever_is_slow(world_size: int, seed: int) -> None:
    segments = run(world_size, seed)
    assert segments.flags == [[12] * world_size] * world_size


@pytest.mark.parametrize("left", ROUNDS_OF_A_LAYER)
def test_with_either_round_left_out_something_is_overwritten(left: str) -> None:
    schedules = (run(3, seed, rounds=(left,)) for seed in range(50))
    with pytest.raises(Overwritten):
        list(schedules)
