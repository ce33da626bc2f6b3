"""Owns the model and the KV cache of one rank, and runs forward passes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nibble.config.resolve import EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.cpu_backend import CpuAttentionBackend
from nibble.layers.attention.torch_backend import TorchAttentionBackend
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.weight_loader import load_weights
from nibble.models.registry import create_model
from nibble.utils.dtypes import torch_dtype


class ModelRunner:
    def __init__(
        self, config: EngineConfig, parallel: ParallelState, on_stage: Callable[[str], None] = lambda _: None
    ) -> None:
        """Loads the weights. Raises ConfigError for a checkpoint that does not fit."""
        self.config = config
        self.parallel = parallel
        on_stage("building the model")
        self.model = create_model(config, parallel)
        on_stage("loading weights")
        load_weights(
            self.model,
            Path(config.model_folder),
            config.args.load_format,
            show_progress=parallel.rank == 0 and config.args.log_level in ("info", "debug"),
        )
        on_stage("allocating the KV cache")
        model = config.model
        self.pool = KvCachePool(model, config.num_pages, config.args.page_size, torch_dtype(config.kv_cache_dtype))
        backend = CpuAttentionBackend if config.cpu_kernels == "c" else TorchAttentionBackend
        self.attention_backend = backend(self.pool)
        self.vocab_size = model.vocab_size

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch | None, global_num_tokens: Sequence[int]) -> torch.Tensor:
        """fp32 logits `[len(logit_rows), vocab]`. Collective: all ranks call it, idle ones with None."""
        with dp_step(DpStep(self.parallel.dp_group, tuple(global_num_tokens))):
            if batch is None:
                nothing = torch.empty(0, dtype=torch.int64)
                self.model.forward(nothing, nothing, None)
                return torch.empty(0, self.vocab_size)
            hidden = self.model.forward(
                torch.tensor(batch.input_ids),
                torch.tensor(batch.positions),
                self.attention_backend.plan(batch.attention),
            )
            if len(batch.logit_rows) < len(hidden):
                hidden = hidden[batch.logit_rows]
            return self.model.compute_logits(hidden)
