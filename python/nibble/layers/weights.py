"""How a layer says which tensors of the checkpoint it takes, and where they go."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class WeightTarget:
    """One tensor of the checkpoint. `load` gets a tensor of exactly `shape` and one of `dtypes`.

    `dummy` makes a random tensor of the same format, for --load-format dummy.
    """

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[torch.Tensor], object]
    dummy: Callable[[torch.Generator], torch.Tensor]


class Layer(Protocol):
    """A part of a model that takes weights from the checkpoint."""

    def weight_targets(self, prefix: str) -> Mapping[str, WeightTarget | None]:
        """The tensors this layer knows, by their full names in the checkpoint; None for another rank's."""
        ...

    # A layer may also have `process_weights_after_loading(self) -> None`, called once all are loaded.


def float_target(destination: torch.Tensor, mean: float = 0.0) -> WeightTarget:
    """A floating-point tensor copied (and cast) into `destination`."""
    shape = tuple(destination.shape)
    return WeightTarget(
        shape=shape,
        dtypes=FLOAT_DTYPES,
        load=lambda tensor: destination.copy_(tensor),
        dummy=lambda generator: torch.randn(shape, generator=generator) * 0.02 + mean,
    )
