"""Who has how many rows in this step, and the collectives that move them.

With data-parallel attention every attention group runs attention on rows of its own requests; the ranks of a group
all have its rows. Layers that need the rows of all groups (the experts, lm_head) ask here how many there are; the
model runner installs the answer for one forward pass. Sizes and communicators travel in one object, so that sizes of
one group never meet a collective of another.

D attention groups of A ranks; T rows of this group, S of all groups as they are gathered, R rows that need logits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
import torch.nn.functional as F

from nibble.distributed.parallel_state import ParallelState


class DpPaddingMode(Enum):
    """How the rows of all groups lie in one tensor."""

    SUM_LEN = "sum_len"
    """Each group's rows after those of the one before."""
    MAX_LEN = "max_len"
    """As many of every group as the largest has, rounded up to a multiple of A, so that every rank can own some."""


def cheapest_padding_mode(global_num_tokens: Sequence[int], attn_tp_size: int) -> DpPaddingMode:
    """The mode in which fewer rows travel, there and back.

    Ranks that are a group each never need padding: there and back every row travels once. In a larger group SUM_LEN
    gathers S rows and takes an all-reduce of S, which is two passes. MAX_LEN gathers D * L rows, sums as many in one
    pass, and gathers L in the group.
    """
    groups, total = len(global_num_tokens), sum(global_num_tokens)
    if attn_tp_size > 1 and (2 * groups + 1) * _longest(global_num_tokens, attn_tp_size) < 3 * total:
        return DpPaddingMode.MAX_LEN
    return DpPaddingMode.SUM_LEN


def _longest(global_num_tokens: Sequence[int], attn_tp_size: int) -> int:
    """Rows of the largest group, rounded up until its ranks can own equally many."""
    return -(-max(global_num_tokens) // attn_tp_size) * attn_tp_size


@dataclass(frozen=True)
class DpStep:
    """The rows of every attention group in one forward pass, and those whose logits are wanted."""

    parallel: ParallelState
    global_num_tokens: tuple[int, ...]
    global_num_logit_rows: tuple[int, ...]
    is_padding: torch.Tensor | None = None
    """Bool [local rows, 1], true for rows that only fill this rank up to a CUDA graph's size; None if none may be."""

    def __post_init__(self) -> None:
        group = self.parallel.dp_group
        for sizes in (self.global_num_tokens, self.global_num_logit_rows):
            if len(sizes) != group.world_size:
                raise ValueError(f"{len(sizes)} sizes for the {group.world_size} ranks of group {group.name!r}")

    @cached_property
    def padding_mode(self) -> DpPaddingMode:
        return cheapest_padding_mode(self.global_num_tokens, self.parallel.attn_tp_group.world_size)

    @cached_property
    def gathered_sizes(self) -> tuple[int, ...]:
        """The rows of every group in a gathered tensor, with padding."""
        if self.padding_mode is DpPaddingMode.SUM_LEN:
            return self.global_num_tokens
        longest = _longest(self.global_num_tokens, self.parallel.attn_tp_group.world_size)
        return (longest,) * len(self.global_num_tokens)


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
    """Rows of every attention group in this step, by DP rank."""
    return _step().global_num_tokens


def get_dp_local_num_tokens() -> int:
    """Rows of this rank's attention group in this step."""
    return get_dp_global_num_tokens()[get_dp_rank()]


def get_dp_padding_mode() -> DpPaddingMode:
    return _step().padding_mode


def mask_padding(topk_ids: torch.Tensor) -> torch.Tensor:
    """`topk_ids [local rows, K]` without experts (-1, which no rank holds) in the rows that are padding."""
    is_padding = _step().is_padding
    return topk_ids if is_padding is None else topk_ids.masked_fill(is_padding, -1)


def get_dp_rank() -> int:
    return _step().parallel.dp_group.rank


def get_dp_size() -> int:
    return _step().parallel.dp_group.world_size


def dp_pad(x: torch.Tensor, value: float = 0) -> torch.Tensor:
    """`[T, ...]` with as many rows as this step's padding mode gathers of a group; those added hold `value`."""
    missing = _step().gathered_sizes[get_dp_rank()] - x.shape[0]
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, missing), value=value) if missing else x


def dp_gather(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gathers each tensor of this group's (padded) rows to `[S, ...]`, the rows of all groups, on every rank."""
    step = _step()
    return step.parallel.dp_group.all_gatherv(list(tensors), step.gathered_sizes)


def dp_reduce_scatter(partial: torch.Tensor) -> torch.Tensor:
    """Sums `[S, ...]` over all ranks and returns this group's rows `[T, ...]` on each of its ranks.

    The one place where the experts' results are summed, over expert groups and over parts of an expert's width.
    """
    parallel = _step().parallel
    if get_dp_padding_mode() is DpPaddingMode.MAX_LEN:
        share = parallel.tp_group.reduce_scatter(partial)  # [S / (D * A), ...], every rank owns some rows of its group
        return parallel.attn_tp_group.all_gather(share)[: get_dp_local_num_tokens()]
    if parallel.attn_tp_group.world_size == 1:
        return parallel.tp_group.reduce_scatterv(partial, get_dp_global_num_tokens())
    return parallel.tp_group.all_reduce(partial).split(get_dp_global_num_tokens())[get_dp_rank()]


def dp_exchange(partial: torch.Tensor) -> torch.Tensor:
    """What `dp_reduce_scatter` sums, of any dtype: every rank's rows for this one, `[W * T, ...]` of their `[S, ...]`.

    For ranks that are an attention group each.
    """
    parallel = _step().parallel
    assert parallel.attn_tp_group.world_size == 1
    return parallel.tp_group.all_to_allv(partial, get_dp_global_num_tokens())


def dp_gather_logit_rows(hidden: torch.Tensor) -> torch.Tensor:
    """Gathers this group's `[R, H]` to the rows of all groups."""
    step = _step()
    return step.parallel.dp_group.all_gatherv(hidden.contiguous(), step.global_num_logit_rows)


def dp_own_logit_rows(logits: torch.Tensor) -> torch.Tensor:
    """This group's rows of what was computed for those of all groups."""
    return logits.split(_step().global_num_logit_rows)[get_dp_rank()]
