"""Small tensors on their way to a GPU and back, for which the host does not wait."""

from collections.abc import Sequence

import torch


class StagedTensor:
    """A tensor on a device that the host fills anew for each step, with a single copy.

    The host writes to `values`, but not before the copy of the last step has been made.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor = torch.zeros(size, dtype=dtype, device=device)
        self._host = torch.zeros(size, dtype=dtype, pin_memory=device.type == "cuda")
        self.values = self._host.numpy()  # the same memory

    def send(self, count: int) -> None:
        """Copies the first `count` values, in the order of the device's work."""
        self.tensor[:count].copy_(self._host[:count], non_blocking=True)


def to_device(
    values: Sequence[int | float | tuple[float, ...]], device: torch.device, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """`torch.tensor` on the device, which by itself would wait for all work that the GPU has been given before."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory, which is there when the GPU has done what it has been given before; on a CPU itself."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
