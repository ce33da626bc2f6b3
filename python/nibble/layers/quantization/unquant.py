"""Layers in the activations' own type."""

from collections.abc import Sequence

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.select import Kernels
from nibble.kernels.torch.fused_moe import fused_moe
from nibble.kernels.torch.wire_row import UnpackedRows
from nibble.layers.moe.token_dispatcher import GatheredRows
from nibble.layers.weights import WeightTarget, float_target
from nibble.utils.dtypes import torch_dtype

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of one expert, by their names in the checkpoint."""


class UnquantizedLinear:
    """`x @ weight.T + bias`. `parts` are (name in the checkpoint, rows) in the order of the output."""

    def __init__(
        self, kernels: Kernels, in_features: int, parts: Sequence[tuple[str, int]], bias: bool, dtype: torch.dtype
    ) -> None:
        self.kernel = kernels.linear
        self.parts = list(parts)
        out_features = sum(rows for _, rows in parts)
        self.weight = torch.empty(out_features, in_features, dtype=dtype)  # [N, K]
        self.bias = torch.empty(out_features, dtype=dtype) if bias else None  # [N]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x, self.weight, self.bias)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = {}
        start = 0
        for name, rows in self.parts:
            targets[f"{prefix}.{name}.weight"] = float_target(self.weight[start : start + rows])
            if self.bias is not None:
                targets[f"{prefix}.{name}.bias"] = float_target(self.bias[start : start + rows])
            start += rows
        return targets


class UnquantizedFusedMoEMethod:
    """This rank's experts on gathered rows."""

    def __init__(self, config: EngineConfig, parallel: ParallelState) -> None:
        moe = config.model.moe
        assert moe is not None
        self.num_experts, self.experts = moe.num_experts, parallel.local_experts(moe.num_experts)
        hidden, width, dtype = config.model.hidden_size, moe.intermediate_size, torch_dtype(config.dtype)
        self.w13 = torch.empty(len(self.experts), 2 * width, hidden, dtype=dtype)  # [E, 2I, H], gate then up
        self.w2 = torch.empty(len(self.experts), hidden, width, dtype=dtype)  # [E, H, I]

    def apply(self, rows: GatheredRows | UnpackedRows) -> torch.Tensor:
        assert isinstance(rows, GatheredRows)
        return fused_moe(rows.x, rows.topk_ids, rows.topk_weights, self.w13, self.w2, first_expert=self.experts.start)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]:
        targets: dict[str, WeightTarget | None] = {}
        for expert in range(self.num_experts):
            names = [f"{prefix}.{expert}.{part}.weight" for part in PROJECTIONS]
            if expert in self.experts:
                index = expert - self.experts.start
                gate, up = self.w13[index].chunk(2)
                tensors = (gate, up, self.w2[index])
                targets.update({name: float_target(t) for name, t in zip(names, tensors, strict=True)})
            else:
                targets.update(dict.fromkeys(names))
        return targets

    def process_weights_after_loading(self) -> None:
        pass
