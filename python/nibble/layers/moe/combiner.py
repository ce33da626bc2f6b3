"""How the experts' partial results come back: every rank's of all rows in, the sums of this rank's rows out.

T: rows of this rank, S: rows of all ranks, W: ranks, H: hidden size.
"""

from typing import Protocol

import torch

from nibble.config.resolve import EngineConfig
from nibble.kernels.select import select_kernels
from nibble.kernels.torch.fp8_row import Fp8RowLayout
from nibble.layers.dp_attention import dp_exchange, dp_reduce_scatter, get_dp_size
from nibble.utils.dtypes import torch_dtype


class Combiner(Protocol):
    def out(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Where the experts' results belong, if not in a new tensor; `rows` are those of all ranks, whatever they are.

        The experts may leave them elsewhere nevertheless.
        """
        ...

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        """[S, H], or what `out` returned, to [T, H]. Collective."""
        ...


class ReduceScatterCombiner:
    """Results travel as they are, and the collective sums them."""

    def out(self, rows: torch.Tensor) -> None:
        return None

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        return dp_reduce_scatter(partial)


class Fp8Combiner:
    """Results travel as FP8 rows, and each rank sums those of its own rows: in fp32, in rank order."""

    def __init__(self, config: EngineConfig) -> None:
        self.layout = Fp8RowLayout(config.model.hidden_size)
        self.dtype = torch_dtype(config.dtype)
        self.kernels = select_kernels(config.kernels, config.moe_kernel)

    def out(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.new_empty(rows.shape[0], self.layout.row_bytes, dtype=torch.uint8)

    def combine(self, partial: torch.Tensor) -> torch.Tensor:
        fp8_rows = partial if partial.dtype == torch.uint8 else self.kernels.quantize_fp8_rows(partial, None)
        terms = dp_exchange(fp8_rows)  # [S, R] -> [W * T, R]
        return self.kernels.sum_fp8_rows(terms, get_dp_size(), self.layout.hidden_size, self.dtype)


def make_combiner(config: EngineConfig) -> Combiner:
    """The one that takes collectives."""
    return Fp8Combiner(config) if config.args.moe_combine_dtype == "fp8" else ReduceScatterCombiner()
