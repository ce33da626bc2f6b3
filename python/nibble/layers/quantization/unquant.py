"""Layers in the activations' own type."""

from collections.abc import Sequence

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.select import Kernels
from nibble.kernels.torch.fused_moe import fused_moe
from nibble.kernels.torch.wire_row import UnpackedRows
from nibble.layers.moe.token_dispatcher import GatheredRows
from nibble.layers.weights import Shard, WeightTarget, float_target
from nibble.utils.dtypes import torch_dtype

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of one expert, by their names in the checkpoint."""


class UnquantizedLinear:
    """`x @ weight.T + bias`. `parts` are (name in the checkpoint, rows) in the order of the output."""

    def __init__(
        self, kernels: Kernels, columns: Shard, parts: Sequence[tuple[str, Shard]], bias: bool, dtype: torch.dtype
    ) -> None:
        self.kernel = kernels.linear
        self.columns = columns
        self.parts = list(parts)
        out_features = sum(rows.size for _, rows in parts)
        self.weight = torch.empty(out_features, columns.size, dtype=dtype)  # [N, K]
        self.bias = torch.empty(out_features, dtype=dtype) if bias else None  # [N]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x, self.weight, self.bias)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = {}
        start = 0
        for name, rows in self.parts:
            end = start + rows.size
            targets[f"{prefix}.{name}.weight"] = float_target(self.weight[start:end], shards=[rows, self.columns])
            if self.bias is not None:
                targets[f"{prefix}.{name}.bias"] = float_target(self.bias[start:end], shards=[rows])
            start = end
        return targets

    def process_weights_after_loading(self) -> None:
        pass


class UnquantizedFusedMoEMethod:
    """This rank's experts, or its part of their width, on gathered rows."""

    def __init__(self, config: EngineConfig, parallel: ParallelState) -> None:
        moe = config.model.moe
        assert moe is not None
        self.num_experts, self.experts = moe.num_experts, parallel.local_experts(moe.num_experts)
        self.width = Shard.split(moe.intermediate_size, parallel.moe_tp_rank, parallel.moe_tp_size)
        hidden, width, dtype = config.model.hidden_size, self.width.size, torch_dtype(config.dtype)
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
                down = self.w2[index]
                hidden = Shard.whole(len(down))
                for name, rows in zip(names[:2], self.w13[index].chunk(2), strict=True):
                    targets[name] = float_target(rows, shards=[self.width])
                targets[names[2]] = float_target(down, shards=[hidden, self.width])
            else:
                targets.update(dict.fromkeys(names))
        return targets

    def process_weights_after_loading(self) -> None:
        pass
