"""Linear layers, merged where the checkpoint stores parts that are computed as one, and split over ranks.

Split by rows of the weight (column-parallel, in the language of Megatron-LM, arXiv:1909.08053) each rank computes some
of the outputs, and the parts say which: `make_linear`. Split by columns (row-parallel) each rank computes a term of
every output from its part of the input: `RowParallelLinear`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from nibble.config.quantization_config import NVFP4_GROUP_SIZE
from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import Communicator
from nibble.kernels.select import select_kernels
from nibble.layers.partial_sum import Summand, partial_sum
from nibble.layers.quantization.modelopt_quant import ModelOptNvFp4Linear
from nibble.layers.quantization.unquant import UnquantizedLinear
from nibble.layers.weights import Layer, Shard, WeightTarget
from nibble.utils.dtypes import torch_dtype


class Linear(Layer, Protocol):
    """Computes `x [T, K] -> [T, N]`."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def process_weights_after_loading(self) -> None: ...


def make_linear(
    config: EngineConfig,
    prefix: str,
    in_features: int | Shard,
    parts: Sequence[tuple[str, int | Shard]],
    bias: bool = False,
) -> Linear:
    """The linear layer for the modules `prefix.name` of the checkpoint, quantized as it says there.

    A number stands for all rows (or columns) of a weight, a shard for a part of them.
    """
    quantization = config.quantization
    is_quantized = quantization is not None and quantization.is_quantized(*(f"{prefix}.{name}" for name, _ in parts))
    return (ModelOptNvFp4Linear if is_quantized else UnquantizedLinear)(
        select_kernels(config.kernels, config.moe_kernel),
        _as_shard(in_features),
        [(name, _as_shard(rows)) for name, rows in parts],
        bias,
        torch_dtype(config.dtype),
    )


class RowParallelLinear:
    """`x [T, K_local] -> [T, N]`, a term of the sum over the ranks of `group`, one of which adds the bias."""

    def __init__(
        self,
        config: EngineConfig,
        group: Communicator,
        prefix: str,
        in_features: Shard,
        part: tuple[str, int],
        bias: bool = False,
    ) -> None:
        self.group = group
        self.linear = make_linear(config, prefix, in_features, [part], bias and group.rank == 0)
        self.bias_name = f"{part[0]}.bias" if bias else None

    def __call__(self, x: torch.Tensor) -> Summand:
        return partial_sum(self.linear(x), self.group)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]:
        others: dict[str, WeightTarget | None] = {f"{prefix}.{self.bias_name}": None} if self.bias_name else {}
        return others | dict(self.linear.weight_targets(prefix))

    def process_weights_after_loading(self) -> None:
        self.linear.process_weights_after_loading()


def split_heads(num_heads: int, head_dim: int, group: Communicator) -> Shard:
    """The values of this rank's heads. Where there are fewer heads than ranks, neighbours have the same one."""
    if num_heads >= group.world_size:
        return Shard.split(num_heads * head_dim, group.rank, group.world_size, head_dim)
    return Shard(num_heads * head_dim, group.rank * num_heads // group.world_size * head_dim, head_dim)


def split_width(config: EngineConfig, width: int, group: Communicator) -> Shard:
    """This rank's share of the width of a feed-forward layer: of a quantized one, whole blocks."""
    unit = 1 if config.quantization is None or group.world_size == 1 else NVFP4_GROUP_SIZE
    return Shard.split(width, group.rank, group.world_size, unit)


def _as_shard(size: int | Shard) -> Shard:
    return size if isinstance(size, Shard) else Shard.whole(size)
