"""Carries rows to the ranks that hold their experts, and the partial results back.

Every rank sends all its rows to all ranks and keeps, of what the experts return, the sum for its own rows.
T: rows of this rank, S: rows of all ranks, H: hidden size, K: experts per token, R: bytes of a wire row.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from nibble.config.resolve import EngineConfig
from nibble.kernels.select import select_kernels
from nibble.kernels.torch.wire_row import UnpackedRows, WireRowLayout, unpack
from nibble.layers.dp_attention import dp_gather, dp_pad
from nibble.layers.moe.combiner import Combiner


@dataclass(frozen=True)
class GatheredRows:
    """The rows of all ranks, not quantized."""

    x: torch.Tensor  # [S, H]
    topk_ids: torch.Tensor  # [S, K] int32, global expert ids
    topk_weights: torch.Tensor  # [S, K] fp32
    out: torch.Tensor | None = None  # as that of UnpackedRows


class TokenDispatcher(Protocol):
    """Rows out to all ranks and sums back. Both are collective: a rank without rows takes part as well."""

    def dispatch(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> GatheredRows | UnpackedRows: ...

    def combine(self, partial: torch.Tensor) -> torch.Tensor: ...


class Fp4AllGatherDispatcher:
    """Quantizes to NVFP4 before the gather: one packed wire row a token, one collective."""

    def __init__(self, config: EngineConfig, top_k: int, combiner: Combiner) -> None:
        self.combiner = combiner
        self.layout = WireRowLayout(config.model.hidden_size, top_k)
        self.quantize_pack = select_kernels(config.kernels, config.moe_kernel).quantize_pack
        self.input_scale: torch.Tensor | None = None
        """fp32 scalar, the same on all ranks; set once the weights are loaded."""

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> UnpackedRows:
        assert self.input_scale is not None
        rows = self.quantize_pack(x, topk_ids, topk_weights, self.input_scale)  # [T, R]
        (all_rows,) = dp_gather([rows])  # [S, R]
        return replace(unpack(all_rows, self.layout), out=self.combiner.out(all_rows))

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        return self.combiner.combine(partial)  # [S, H] -> [T, H]


class AllGatherDispatcher:
    """Gathers the activations as they are: the generic path, for every split. Padding belongs to no expert."""

    def __init__(self, combiner: Combiner) -> None:
        self.combiner = combiner

    def dispatch(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> GatheredRows:
        x, topk_ids, topk_weights = dp_gather([dp_pad(x), dp_pad(topk_ids, value=-1), dp_pad(topk_weights)])
        return GatheredRows(x, topk_ids, topk_weights, self.combiner.out(x))

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        return self.combiner.combine(partial)  # [S, H] -> [T, H]
