"""Owns the model and the KV cache of one rank, and runs forward passes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nibble.config.resolve import DTYPE_BYTES, EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.cpu_backend import CpuAttentionBackend
from nibble.layers.attention.torch_backend import TorchAttentionBackend
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.weight_loader import load_weights
from nibble.models.registry import create_model
from nibble.utils.dtypes import torch_dtype
from nibble.utils.errors import ConfigError


class ModelRunner:
    def __init__(
        self, config: EngineConfig, parallel: ParallelState, on_stage: Callable[[str], None] = lambda _: None
    ) -> None:
        """Loads the weights. Raises ConfigError for a checkpoint that does not fit."""
        self.config = config
        self.parallel = parallel
        self.device = parallel.device
        on_stage("building the model")
        with self.device:
            self.model = create_model(config, parallel)
        on_stage("loading weights")
        load_weights(
            self.model,
            Path(config.model_folder),
            config.args.load_format,
            self.device,
            show_progress=parallel.rank == 0
            and config.args.log_level in ("info", "debug")
            and config.args.log_format == "text",
        )
        on_stage("allocating the KV cache")
        num_pages = config.num_pages or self._pages_that_fit()
        dtype = torch_dtype(config.kv_cache_dtype)
        self.pool = KvCachePool(config.model, num_pages, config.args.page_size, dtype, self.device)
        backend = CpuAttentionBackend if config.kernels == "c" else TorchAttentionBackend
        self.attention_backend = backend(self.pool)
        self.vocab_size = config.model.vocab_size

    def _pages_that_fit(self) -> int:
        """Pages for the KV cache beside the weights in this rank's share of its GPU, the same on all ranks."""
        config, args = self.config, self.config.args
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        share = total * args.mem_fraction_static / config.ranks_per_gpu - torch.cuda.memory_reserved(self.device)
        page_bytes = config.model.kv_elements_per_token * DTYPE_BYTES[config.kv_cache_dtype] * args.page_size
        fitting = int(max(0, min(share, free)) // page_bytes)
        wanted = -(-args.max_running_requests * config.context_length // args.page_size)
        everywhere = self.parallel.cpu_group.all_gather(torch.tensor([min(fitting, wanted)]))
        pages = int(everywhere.min())
        if pages * args.page_size < config.context_length:
            raise ConfigError(
                f"beside the weights {pages * args.page_size} tokens of KV cache fit into this rank's share of the "
                f"GPU ({share / 2**20:.0f} MiB of {total / 2**20:.0f}), fewer than one request of --context-length "
                f"{config.context_length} needs; lower --context-length or raise --mem-fraction-static"
            )
        return pages

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch | None, global_num_tokens: Sequence[int]) -> torch.Tensor:
        """fp32 logits `[len(logit_rows), vocab]`. Collective: all ranks call it, idle ones with None.

        Raises CollectiveError if a peer fails; the logits may be read.
        """
        with dp_step(DpStep(self.parallel.dp_group, tuple(global_num_tokens))):
            logits = self._forward(batch)
        self.parallel.dp_group.synchronize()
        return logits

    def _forward(self, batch: ForwardBatch | None) -> torch.Tensor:
        if batch is None:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            self.model.forward(nothing, nothing, None)
            return torch.empty(0, self.vocab_size, device=self.device)
        hidden = self.model.forward(
            torch.tensor(batch.input_ids, device=self.device),
            torch.tensor(batch.positions, device=self.device),
            self.attention_backend.plan(batch.attention),
        )
        if len(batch.logit_rows) < hidden.shape[0]:
            hidden = hidden[batch.logit_rows]
        return self.model.compute_logits(hidden)
