"""Who has how many rows in this step, and the collectives that move them.

With data-parallel attention every rank runs attention on rows of its own requests. Layers that need the rows of
all ranks (the experts) ask here how many there are; the model runner installs the answer for one forward pass.
Sizes and communicator travel in one object, so that sizes of one group never meet a collective of another.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nibble.distributed.communicator import Communicator


@dataclass(frozen=True)
class DpStep:
    """The rows of every DP rank in one forward pass, and the group they belong to."""

    group: Communicator
    global_num_tokens: tuple[int, ...]
    is_padding: torch.Tensor | None = None
    """Bool [local rows, 1], true for rows that only fill this rank up to a CUDA graph's size; None if none may be."""

    def __post_init__(self) -> None:
        if len(self.global_num_tokens) != self.group.world_size:
            raise ValueError(
                f"{len(self.global_num_tokens)} sizes for the {self.group.world_size} ranks "
                f"of group {self.group.name!r}"
            )


_current: DpStep | None = None


@contextmanager
def dp_step(step: DpStep) -> Iterator[None]:
    """Installs `step` for one forward pass; refuses nesting, always clears."""
    global _current
    if _current is not None:
        raise RuntimeError("a forward pass is already running on this rank")
    _current = step
    try:
        yield
    finally:
        _current = None


def _step() -> DpStep:
    if _current is None:
        raise RuntimeError("no forward pass is running: the model runner installs the sizes with dp_step()")
    return _current


def get_dp_global_num_tokens() -> tuple[int, ...]:
    """Rows of every DP rank in this step, by rank."""
    return _step().global_num_tokens


def get_dp_local_num_tokens() -> int:
    """Rows of this DP rank in this step."""
    step = _step()
    return step.global_num_tokens[step.group.rank]


def mask_padding(topk_ids: torch.Tensor) -> torch.Tensor:
    """`topk_ids [local rows, K]` without experts (-1, which no rank holds) in the rows that are padding."""
    is_padding = _step().is_padding
    return topk_ids if is_padding is None else topk_ids.masked_fill(is_padding, -1)


def get_dp_rank() -> int:
    return _step().group.rank


def get_dp_size() -> int:
    return _step().group.world_size


def dp_gather(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gathers each `[local rows, ...]` tensor of this rank to `[sum of rows, ...]` on every rank."""
    step = _step()
    return step.group.all_gatherv(list(tensors), step.global_num_tokens)


def dp_reduce_scatter(partial: torch.Tensor) -> torch.Tensor:
    """Sums `[sum of rows, ...]` over the ranks and returns this rank's `[local rows, ...]`.

    The one place where the partial results of expert-parallel ranks are summed.
    """
    step = _step()
    return step.group.reduce_scatterv(partial, step.global_num_tokens)
