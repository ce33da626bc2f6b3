"""What tests of kernels on a GPU share."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_replays_what_inputs_hold(
    run: Callable[[], Tensor], inputs: list[Tensor], others: list[list[Tensor]]
) -> None:
    """A captured graph of `run` gives the bits of an eager call, for each of `others` copied into `inputs`."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for values in others:
        for tensor, value in zip(inputs, values, strict=True):
            tensor.copy_(value)
        graph.replay()
        assert torch.equal(captured, run())
