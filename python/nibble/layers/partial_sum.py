"""Who adds up what the ranks have computed in parts: one owner for each sum.

A layer that computes only a part of its result returns it as a `PartialSum`, and everything that takes a tensor takes
none of those: the sum has to be completed in between. `complete` does so, and lets tensors pass. So no sum is taken
twice and none is forgotten, whatever the split: what is left to do is in the type.

Sums are completed where the residual is added, in `RMSNorm.after_adding` and at the end of a model. The experts' own,
over all ranks and with rows that change hands, is `dp_attention.dp_reduce_scatter`, and their result is complete.
"""

from dataclasses import dataclass

from torch import Tensor

from nibble.distributed.communicator import Communicator


@dataclass(frozen=True, eq=False)
class PartialSum:
    """This rank's term `[T, ...]` of a sum over the ranks of `group`, which all have the same rows."""

    term: Tensor
    group: Communicator


Summand = Tensor | PartialSum
"""What a layer adds to the residual: complete, or a part of it."""


def partial_sum(term: Tensor, group: Communicator) -> Summand:
    """The term of a sum; of a group of one rank it is all of it."""
    return term if group.world_size == 1 else PartialSum(term, group)


def add_complete(x: Summand, whole: Tensor) -> Summand:
    """`x + whole`; to a sum that is still to be taken one rank alone brings `whole`, which all have."""
    if isinstance(x, Tensor):
        return x + whole
    return PartialSum(x.term + whole if x.group.rank == 0 else x.term, x.group)


def complete(x: Summand) -> Tensor:
    """The sum, the same bits on each rank of its group. Collective if it is still to be taken."""
    return x.group.all_reduce(x.term) if isinstance(x, PartialSum) else x
