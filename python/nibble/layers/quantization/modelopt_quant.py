"""ModelOpt NVFP4 layers (W4A4): e2m1 values, an e4m3 scale per 16 of them, an fp32 scale per tensor.

A linear layer `P` is stored as `P.weight` uint8 [N, K/2], `P.weight_scale` e4m3 [N, K/16], and the fp32 scalars
`P.weight_scale_2` and `P.input_scale`. Activations are quantized with `input_scale`; products accumulate in fp32
on values without their tensor-wide scales, and `alpha = input_scale * weight_scale_2` is applied to the sum.
"""

from collections.abc import Sequence

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.select import Kernels, select_kernels
from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.torch.nvfp4 import BLOCK_SIZE, quantize_nvfp4
from nibble.kernels.torch.wire_row import UnpackedRows
from nibble.layers.moe.token_dispatcher import Fp4AllGatherDispatcher, GatheredRows
from nibble.layers.quantization.unquant import PROJECTIONS
from nibble.layers.weights import Shard, WeightTarget, float_target, target
from nibble.utils.dtypes import torch_dtype
from nibble.utils.errors import ConfigError


class Nvfp4Weight:
    """A part of one quantized matrix, stored as in the checkpoint: `N` rows of `K` values in whole blocks.

    Raises ConfigError for columns that cut a block, because its values share one scale.
    """

    def __init__(self, rows: Shard, columns: Shard) -> None:
        if columns.full % BLOCK_SIZE:
            raise ConfigError(f"NVFP4 needs rows of a multiple of {BLOCK_SIZE} values, got {columns.full}")
        if columns.start % BLOCK_SIZE or columns.size % BLOCK_SIZE:
            raise ConfigError(
                f"NVFP4 weights can't be cut inside a block of {BLOCK_SIZE} values, and a rank would have the values "
                f"{columns.start} to {columns.start + columns.size - 1} of {columns.full}; split over fewer ranks"
            )
        self.rows, self.columns = rows, columns
        self.values = torch.empty(rows.size, columns.size // 2, dtype=torch.uint8)  # [N, K/2]
        self.scales = torch.empty(rows.size, columns.size // BLOCK_SIZE, dtype=torch.float8_e4m3fn)  # [N, K/16]
        self.scale_2 = torch.empty((), dtype=torch.float32)
        self.input_scale = torch.empty((), dtype=torch.float32)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        values, scales = self.columns.in_units_of(2), self.columns.in_units_of(BLOCK_SIZE)
        return {
            f"{prefix}.weight": target(self.values, (torch.uint8,), _random_bytes, [self.rows, values]),
            f"{prefix}.weight_scale": target(self.scales, (torch.float8_e4m3fn,), _random_scales, [self.rows, scales]),
            f"{prefix}.weight_scale_2": _scalar(self.scale_2, dummy=_DUMMY_WEIGHT_SCALE_2),
            f"{prefix}.input_scale": _scalar(self.input_scale, dummy=_DUMMY_INPUT_SCALE),
        }


# Weights of about 0.02 with the values and block scales drawn below, and activations of up to 8.
_DUMMY_WEIGHT_SCALE_2 = 4e-5
_DUMMY_INPUT_SCALE = 3e-3


def _random_bytes(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _random_scales(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(shape, generator=generator) * 256 + 64).to(torch.float8_e4m3fn)


def _scalar(destination: torch.Tensor, dummy: float) -> WeightTarget:
    return WeightTarget((), (torch.float32,), destination.copy_, lambda _: torch.tensor(dummy))


class ModelOptNvFp4Linear:
    """`x [T, K] -> [T, N]` for one or several NVFP4 matrices that read the same input."""

    def __init__(
        self, kernels: Kernels, columns: Shard, parts: Sequence[tuple[str, Shard]], bias: bool, dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.kernels = kernels
        self.parts = [(name, Nvfp4Weight(rows, columns)) for name, rows in parts]
        self.bias = torch.empty(sum(rows.size for _, rows in parts), dtype=self.dtype) if bias else None

    def process_weights_after_loading(self) -> None:
        weights = [weight for _, weight in self.parts]
        rows = torch.tensor([weight.rows.size for weight in weights])
        scale_2 = torch.stack([weight.scale_2 for weight in weights])
        self.input_scale = torch.stack([weight.input_scale for weight in weights]).amax()
        self.alpha = (self.input_scale * scale_2).repeat_interleave(rows)  # [N]
        self.matmul = self.kernels.nvfp4_linear(
            torch.cat([weight.values for weight in weights]),
            torch.cat([weight.scales for weight in weights]),
            self.input_scale,
            self.alpha,
        )
        for weight in weights:
            del weight.values, weight.scales

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = self.matmul(x).to(self.dtype)
        return out if self.bias is None else out + self.bias

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        targets = {}
        start = 0
        for name, weight in self.parts:
            targets.update(weight.weight_targets(f"{prefix}.{name}"))
            end = start + weight.rows.size
            if self.bias is not None:
                targets[f"{prefix}.{name}.bias"] = float_target(self.bias[start:end], shards=[weight.rows])
            start = end
        return targets


class ModelOptNvFp4FusedMoEMethod:
    """This rank's NVFP4 experts, or its blocks of their width, on rows quantized before the gather or, without it,
    after.
    """

    def __init__(
        self, config: EngineConfig, parallel: ParallelState, fp4_dispatcher: Fp4AllGatherDispatcher | None
    ) -> None:
        moe = config.model.moe
        assert moe is not None
        hidden, width = config.model.hidden_size, moe.intermediate_size
        if hidden % BLOCK_SIZE or width % BLOCK_SIZE:
            raise ConfigError(
                f"NVFP4 experts need sizes that are multiples of {BLOCK_SIZE}, got hidden {hidden}, width {width}"
            )
        self.num_experts = moe.num_experts
        self.experts = parallel.local_experts(moe.num_experts)
        self.dtype = torch_dtype(config.dtype)
        self.fp4_dispatcher = fp4_dispatcher
        self.kernels = select_kernels(config.kernels, config.moe_kernel)
        all_hidden = Shard.whole(hidden)
        own_width = Shard.split(width, parallel.moe_tp_rank, parallel.moe_tp_size, BLOCK_SIZE)
        self.gate = [Nvfp4Weight(own_width, all_hidden) for _ in self.experts]
        self.up = [Nvfp4Weight(own_width, all_hidden) for _ in self.experts]
        self.down = [Nvfp4Weight(all_hidden, own_width) for _ in self.experts]
        self.gate_up_input_scales = torch.empty(moe.num_experts, 2)

    def process_weights_after_loading(self) -> None:
        # Rows are quantized before it is known which rank's experts they meet: one scale for all experts.
        self.input_scale = self.gate_up_input_scales.amax()
        if self.fp4_dispatcher is not None:
            self.fp4_dispatcher.input_scale = self.input_scale
        gate_scale_2 = torch.stack([weight.scale_2 for weight in self.gate])
        up_scale_2 = torch.stack([weight.scale_2 for weight in self.up])
        down_scale_2 = torch.stack([weight.scale_2 for weight in self.down])
        w2_input_scale = torch.stack([weight.input_scale for weight in self.down])
        pairs = list(zip(self.gate, self.up, strict=True))
        packed = PackedNvfp4Experts(
            w13=torch.stack([torch.cat([gate.values, up.values]) for gate, up in pairs]),
            w13_scales=torch.stack([torch.cat([gate.scales, up.scales]) for gate, up in pairs]),
            w2=torch.stack([weight.values for weight in self.down]),
            w2_scales=torch.stack([weight.scales for weight in self.down]),
            g1_gate_up=self.input_scale * torch.stack([gate_scale_2, up_scale_2], dim=1),
            w2_input_scale=w2_input_scale,
            g2=w2_input_scale * down_scale_2,
        )
        self.kernel = self.kernels.nvfp4_moe(packed, self.experts.start, self.num_experts)
        del self.gate, self.up, self.down

    def apply(self, rows: GatheredRows | UnpackedRows) -> torch.Tensor:
        if isinstance(rows, GatheredRows):
            x_fp4, x_scale = quantize_nvfp4(rows.x, self.input_scale)
        else:
            x_fp4, x_scale = rows.x_fp4, rows.x_scale
        result = self.kernel(x_fp4, x_scale, rows.topk_ids, rows.topk_weights, rows.out)
        return result.to(self.dtype) if rows.out is None else result

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]:
        targets: dict[str, WeightTarget | None] = {}
        for expert in range(self.num_experts):
            names = [f"{prefix}.{expert}.{part}" for part in PROJECTIONS]
            if expert in self.experts:
                index = expert - self.experts.start
                for name, weights in zip(names, (self.gate, self.up, self.down), strict=True):
                    targets.update(weights[index].weight_targets(name))
            else:
                suffixes = ("weight", "weight_scale", "weight_scale_2", "input_scale")
                targets.update({f"{name}.{suffix}": None for name in names for suffix in suffixes})
            for column, name in enumerate(names[:2]):
                targets[f"{name}.input_scale"] = _scalar(
                    self.gate_up_input_scales[expert, column], dummy=_DUMMY_INPUT_SCALE
                )
        return targets
