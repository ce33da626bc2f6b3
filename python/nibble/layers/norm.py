"""Root-mean-square normalization."""

import torch

from nibble.config.resolve import EngineConfig
from nibble.kernels.select import select_kernels
from nibble.layers.partial_sum import Summand, complete
from nibble.layers.weights import WeightTarget, float_target
from nibble.utils.dtypes import torch_dtype


class RMSNorm:
    """Over the last dimension, of `size`; see `kernels.torch.norm.rms_norm`."""

    def __init__(self, config: EngineConfig, size: int, eps: float | None = None) -> None:
        """`eps` None: the checkpoint's `rms_norm_eps`."""
        self.weight = torch.empty(size, dtype=torch_dtype(config.dtype))
        self.eps = config.model.rms_norm_eps if eps is None else eps
        self.kernels = select_kernels(config.kernels, config.moe_kernel)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Summand, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalized `x + residual`, and that sum: the residual of what follows. Completes `x` if it is partial.
        Both arguments are given away.
        """
        return self.kernels.add_rms_norm(complete(x), residual, self.weight, self.eps)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": float_target(self.weight, mean=1.0)}
