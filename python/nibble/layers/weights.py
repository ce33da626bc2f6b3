"""How a layer says which tensors of the checkpoint it takes, which part of them, and where they go."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nibble.utils.errors import ConfigError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Shard:
    """The part `[start, start + size)` of a dimension that has `full` values in the checkpoint."""

    full: int
    start: int
    size: int

    @classmethod
    def whole(cls, full: int) -> "Shard":
        return cls(full, 0, full)

    @classmethod
    def split(cls, full: int, rank: int, ranks: int, unit: int = 1) -> "Shard":
        """The share of one of several ranks, cut at multiples of `unit`: equal, or one unit more on the first ranks.

        Raises ConfigError when there are fewer units than ranks.
        """
        units, rest = divmod(full, unit)
        if rest or units < ranks:
            raise ConfigError(f"{full} values can't be split over {ranks} ranks at multiples of {unit}")
        start, end = (unit * (part * (units // ranks) + min(part, units % ranks)) for part in (rank, rank + 1))
        return cls(full, start, end - start)

    def in_units_of(self, values: int) -> "Shard":
        """The same part where `values` neighbours are stored as one: packed, or with one scale for all."""
        return Shard(self.full // values, self.start // values, self.size // values)


@dataclass(frozen=True)
class WeightTarget:
    """One tensor of the checkpoint. `load` gets a tensor of exactly `shape` and one of `dtypes`.

    `dummy` makes a random tensor of the same format, for --load-format dummy.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[torch.Tensor], object]
    dummy: Callable[[torch.Generator], torch.Tensor]
    is_optional: bool = False
    """A checkpoint may lack it; its destination is then left as it is."""


class Layer(Protocol):
    """A part of a model that takes weights from the checkpoint."""

    def weight_targets(self, prefix: str) -> Mapping[str, WeightTarget | None]:
        """The tensors this layer knows, by their full names in the checkpoint; None for another rank's."""
        ...

    # A layer may also have `process_weights_after_loading(self) -> None`, called once all are loaded.


Fill = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def target(
    destination: torch.Tensor, dtypes: tuple[torch.dtype, ...], dummy: Fill, shards: Sequence[Shard] = ()
) -> WeightTarget:
    """A tensor copied (and cast) into `destination`. `shards` say which part of it, for each of its first dimensions;
    `dummy` fills the whole of it, so that ranks agree on what they share.
    """
    shape = (*(shard.full for shard in shards), *destination.shape[len(shards) :])

    def load(tensor: torch.Tensor) -> None:
        for dimension, shard in enumerate(shards):
            tensor = tensor.narrow(dimension, shard.start, shard.size)
        destination.copy_(tensor)

    return WeightTarget(shape, dtypes, load, lambda generator: _drawn_and_repeated(dummy, shape, generator))


_DRAWN = 1_000_003  # values; a prime, so that no two rows of a matrix are the same


def _drawn_and_repeated(fill: Fill, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Drawing every value of a large model would take minutes."""
    count = math.prod(shape)
    if count <= _DRAWN:
        return fill(shape, generator)
    return fill((_DRAWN,), generator).repeat(-(-count // _DRAWN))[:count].view(shape)


def float_target(destination: torch.Tensor, mean: float = 0.0, shards: Sequence[Shard] = ()) -> WeightTarget:
    """A floating-point tensor, or the part of it that `shards` say, copied (and cast) into `destination`."""

    def dummy(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02 + mean

    return target(destination, FLOAT_DTYPES, dummy, shards)
