"""The expert that every token uses, beside the routed ones."""

from collections.abc import Callable
from functools import cache

import torch

from nibble.layers.partial_sum import Summand, add_complete


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all layers: each stream keeps memory of its own."""
    return torch.cuda.Stream(device)


class SharedExpert:
    """Computed on the rows that this rank has anyway: nothing travels before it.

    On a GPU it runs on a stream of its own while the routed experts wait for other ranks' rows. It reads `x` and
    writes memory of its own, so nothing that the routed experts write meets it. CUDA graphs capture both streams.
    """

    def __init__(self, feed_forward: Callable[[torch.Tensor], Summand], device: torch.device) -> None:
        """`feed_forward` is without collectives."""
        self.feed_forward = feed_forward
        self.stream = _side_stream(device) if device.type == "cuda" else None

    def add_to(self, routed: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Summand:
        """`routed(x)` plus this expert's part, `[T, H]`; `routed` must not write to `x`."""
        if self.stream is None:
            return add_complete(self.feed_forward(x), routed(x))
        current = torch.cuda.current_stream(x.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            shared = self.feed_forward(x)
        out = routed(x)
        # What this stream allocated is given to nobody else before the wait of its next use.
        current.wait_stream(self.stream)
        return add_complete(shared, out)
