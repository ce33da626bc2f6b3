"""The routed experts of one layer, data-parallel attention on the outside and expert-parallel inside."""

from typing import Protocol

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.torch.wire_row import UnpackedRows
from nibble.layers.dp_attention import mask_padding
from nibble.layers.moe.combiner import make_combiner
from nibble.layers.moe.token_dispatcher import (
    AllGatherDispatcher,
    Fp4AllGatherDispatcher,
    GatheredRows,
    TokenDispatcher,
)
from nibble.layers.moe.topk import make_topk
from nibble.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod
from nibble.layers.quantization.unquant import PROJECTIONS, UnquantizedFusedMoEMethod
from nibble.layers.weights import WeightTarget


class FusedMoEMethod(Protocol):
    """Computes this rank's experts on the rows of all ranks."""

    def apply(self, rows: GatheredRows | UnpackedRows) -> torch.Tensor:
        """Returns `[S, H]`: for each row the weighted sum over this rank's experts, or its part of them, only.

        In `rows.out`, if the method is able to.
        """
        ...

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]: ...

    def process_weights_after_loading(self) -> None: ...


class FusedMoE:
    """The experts of one layer: `x [T, H] -> [T, H]`, complete (summed over all ranks)."""

    def __init__(
        self,
        config: EngineConfig,
        parallel: ParallelState,
        prefix: str,
        correction_bias: torch.Tensor | None = None,
    ) -> None:
        """`correction_bias` as `make_topk` takes it."""
        assert config.model.moe is not None
        self.top_k = config.model.moe.top_k
        self.topk = make_topk(config, correction_bias)
        self.method, self.dispatcher = _make_method(config, parallel, prefix)

    def __call__(self, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        topk_ids, topk_weights = self.topk(router_logits)  # [T, K]
        rows = self.dispatcher.dispatch(x, mask_padding(topk_ids), topk_weights)  # [S, ...]
        partial = self.method.apply(rows)  # [S, H]
        return self.dispatcher.combine(partial)  # [T, H]

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]:
        return self.method.weight_targets(prefix)

    def process_weights_after_loading(self) -> None:
        self.method.process_weights_after_loading()


def _make_method(config: EngineConfig, parallel: ParallelState, prefix: str) -> tuple[FusedMoEMethod, TokenDispatcher]:
    moe = config.model.moe
    assert moe is not None
    names = [f"{prefix}.{expert}.{part}" for expert in range(moe.num_experts) for part in PROJECTIONS]
    if config.quantization is None or not config.quantization.is_quantized(*names):
        return UnquantizedFusedMoEMethod(config, parallel), _make_dispatcher(config, parallel)
    fp4_dispatcher = None
    if config.fp4_allgather.enabled:
        fp4_dispatcher = _make_fp4_dispatcher(config, parallel, moe.top_k)
    method = ModelOptNvFp4FusedMoEMethod(config, parallel, fp4_dispatcher)
    return method, fp4_dispatcher or _make_dispatcher(config, parallel)


def _make_dispatcher(config: EngineConfig, parallel: ParallelState) -> AllGatherDispatcher:
    combiner = make_combiner(config)
    if parallel.peer_memory is None:
        return AllGatherDispatcher(combiner)
    from nibble.layers.moe.peer_dispatcher import PeerCombineDispatcher, PeerCombiner

    return PeerCombineDispatcher(PeerCombiner(parallel.peer_memory, combiner, parallel.rail_group))


def _make_fp4_dispatcher(config: EngineConfig, parallel: ParallelState, top_k: int) -> Fp4AllGatherDispatcher:
    combiner = make_combiner(config)
    if parallel.peer_memory is None:
        return Fp4AllGatherDispatcher(config, top_k, combiner)
    from nibble.layers.moe.peer_dispatcher import PeerCombiner, PeerMemoryDispatcher

    return PeerMemoryDispatcher(config, top_k, PeerCombiner(parallel.peer_memory, combiner, parallel.rail_group))
