"""Linear layers, merged where the checkpoint stores parts that are computed as one."""

from collections.abc import Sequence
from typing import Protocol

import torch

from nibble.config.resolve import EngineConfig
from nibble.kernels.select import select_kernels
from nibble.layers.quantization.modelopt_quant import ModelOptNvFp4Linear
from nibble.layers.quantization.unquant import UnquantizedLinear
from nibble.layers.weights import Layer
from nibble.utils.dtypes import torch_dtype


class Linear(Layer, Protocol):
    """Computes `x [T, K] -> [T, N]`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def make_linear(
    config: EngineConfig, prefix: str, in_features: int, parts: Sequence[tuple[str, int]], bias: bool = False
) -> Linear:
    """The linear layer for the modules `prefix.name` of the checkpoint, quantized as it says there."""
    quantization = config.quantization
    kernels = select_kernels(config.kernels, config.moe_kernel)
    if quantization is None or not quantization.is_quantized(*(f"{prefix}.{name}" for name, _ in parts)):
        return UnquantizedLinear(kernels, in_features, parts, bias, torch_dtype(config.dtype))
    return ModelOptNvFp4Linear(kernels, in_features, parts, bias, torch_dtype(config.dtype))
