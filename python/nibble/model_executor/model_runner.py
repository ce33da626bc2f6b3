"""Owns the model and the KV cache of one rank, and runs forward passes."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch

from nibble.config.resolve import DTYPE_BYTES, EngineConfig
from nibble.distributed.parallel_state import ParallelState
from nibble.kernels.select import select_kernels
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch, GraphAttentionBackend
from nibble.layers.attention.registry import create_attention_backend
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.model_executor.cuda_graph_runner import CudaGraphRunner
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.future_tokens import FutureTokens
from nibble.model_executor.weight_loader import load_weights
from nibble.models.registry import create_model
from nibble.utils.dtypes import torch_dtype
from nibble.utils.errors import ConfigError
from nibble.utils.transfer import to_device

MAX_STEPS_UNDER_WAY = 2
"""One that the device runs, and the next."""


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
            self._shows_progress,
        )
        if parallel.between_nodes is not None:
            on_stage("waiting for other hosts to load")
            parallel.between_nodes.wait_for_all("loading weights")
        self.future_tokens = (
            FutureTokens(config.args.max_running_requests, self.device) if config.overlap_schedule else None
        )
        on_gpu = self.device.type == "cuda"
        self._inputs_copied = torch.cuda.Event() if on_gpu else None
        self._step_ends = deque(torch.cuda.Event() for _ in range(MAX_STEPS_UNDER_WAY if on_gpu else 0))
        self._graphs: CudaGraphRunner | None = None
        num_pages = config.num_pages
        if on_gpu:
            on_stage("compiling kernels and measuring the largest step")
            activations = self._measure_largest_step()
            num_pages = num_pages or self._pages_that_fit(activations)
        assert num_pages is not None  # config.resolve leaves it open on GPUs only
        on_stage("allocating the KV cache")
        self._allocate_cache(num_pages)
        if config.cuda_graph_rows:
            on_stage("capturing CUDA graphs")
            self._graphs = CudaGraphRunner(
                self.model,
                self.pool,
                cast(GraphAttentionBackend, self.attention_backend),
                parallel,
                config.cuda_graph_rows,
                config.context_length,
                self.future_tokens,
                select_kernels(config.kernels, config.moe_kernel).argmax,
                self._shows_progress,
            )

    @property
    def _shows_progress(self) -> bool:
        args = self.config.args
        return self.parallel.rank == 0 and args.log_level in ("info", "debug") and args.log_format == "text"

    @property
    def _peer_memory_bytes(self) -> int:
        """Which are not PyTorch's."""
        memory = self.parallel.peer_memory
        return memory.layout.num_bytes if memory else 0

    def _allocate_cache(self, num_pages: int) -> None:
        config = self.config
        dtype = torch_dtype(config.kv_cache_dtype)
        share_of_model = config.parallel.share_of(config.model)
        self.pool = KvCachePool(share_of_model, num_pages, config.args.page_size, dtype, self.device)
        self.attention_backend = create_attention_backend(config, self.pool)

    def _pages_that_fit(self, activations: int) -> int:
        """Pages of KV cache beside weights and activations in this rank's share of its GPU, the same on all ranks."""
        config, args = self.config, self.config.args
        weights = torch.cuda.memory_allocated(self.device) + self._peer_memory_bytes
        self.parallel.cpu_group.barrier()  # all ranks of a GPU have their weights, and none its cache
        free, total = torch.cuda.mem_get_info(self.device)
        share = min(
            total * args.mem_fraction_static / config.ranks_per_gpu - weights,
            free / config.ranks_per_gpu - activations,
        )
        share_of_model = config.parallel.share_of(config.model)
        page_bytes = share_of_model.kv_elements_per_token * DTYPE_BYTES[config.kv_cache_dtype] * args.page_size
        fitting = int(max(0.0, share) // page_bytes)
        wanted = -(-args.max_running_requests * config.context_length // args.page_size)
        everywhere = self.parallel.cpu_group.all_gather(torch.tensor([min(fitting, wanted)]))
        pages = int(everywhere.min())
        if pages * args.page_size < config.context_length:
            raise ConfigError(
                f"{pages * args.page_size} tokens of KV cache fit into this rank's share of the GPU "
                f"({total / config.ranks_per_gpu / 2**20:.0f} MiB, of which weights and peer memory take "
                f"{weights / 2**20:.0f} and the largest step {activations / 2**20:.0f}), fewer than one request of "
                f"--context-length "
                f"{config.context_length} needs; lower --context-length or --chunked-prefill-size, or raise "
                "--mem-fraction-static"
            )
        return pages

    def _measure_largest_step(self) -> int:
        """Bytes beside the weights that a step takes in which every rank has as many rows as it may. Collective.

        It also compiles kernels, so that no request waits for that.
        """
        config, args = self.config, self.config.args
        weights = torch.cuda.memory_allocated(self.device)
        tokens = min(args.chunked_prefill_size, config.context_length)
        pages = -(-tokens // args.page_size)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._allocate_cache(pages)
        attention = AttentionBatch([tokens], [tokens], [range(pages)])
        batch = ForwardBatch([0] * tokens, list(range(tokens)), attention, logit_rows=[tokens - 1])
        groups = self.parallel.dp_group.world_size
        self.forward(batch, [tokens] * groups, global_num_logit_rows=[1] * groups)
        peak = torch.cuda.max_memory_allocated(self.device)
        del self.pool, self.attention_backend
        torch.cuda.empty_cache()
        return peak - weights

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch | None,
        global_num_tokens: Sequence[int],
        decodes_only: bool = False,
        global_num_logit_rows: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The logits of `run_step`."""
        return self.run_step(batch, (), global_num_tokens, decodes_only, global_num_logit_rows).logits

    def run_step(
        self,
        batch: ForwardBatch | None,
        slots: Sequence[int],
        global_num_tokens: Sequence[int],
        decodes_only: bool = False,
        global_num_logit_rows: Sequence[int] | None = None,
    ) -> "StepOutput":
        """Collective: all ranks call it, idle ones with None.

        `slots` are those of the rows that get a new token. The sizes are the rows of every attention group, and how
        many of them need logits, by default all. `decodes_only` says of the step on all ranks that every sequence has
        one row. The next call may overwrite the output. Raises CollectiveError if a peer fails; otherwise it may be
        read, where steps overlap once the device has got there.
        """
        graph_rows = self._graphs.rows_for(max(global_num_tokens)) if self._graphs and decodes_only else None
        if self._graphs and graph_rows:
            output = self._replay(self._graphs, graph_rows, batch, slots)
        else:
            sizes, logit_sizes = tuple(global_num_tokens), tuple(global_num_logit_rows or global_num_tokens)
            with dp_step(DpStep(self.parallel, sizes, logit_sizes)):
                output = StepOutput(self._forward(batch))
        if self.future_tokens is None:
            self.synchronize(None)
        return output

    def _replay(
        self, graphs: CudaGraphRunner, graph_rows: int, batch: ForwardBatch | None, slots: Sequence[int]
    ) -> "StepOutput":
        if batch is None or (len(slots) == len(batch.input_ids) and not batch.scored):
            return StepOutput(*graphs.replay(graph_rows, batch, slots))
        return StepOutput(_select(graphs.replay(graph_rows, batch).logits, batch))  # not every row gets a new token

    def record_event(self) -> torch.cuda.Event | None:
        """The end of what the device has been given so far; None on a CPU, where it is done.

        Of so many steps as can be under way each has its own event; who waits for an older one waits for a newer.
        """
        if not self._step_ends:
            return None
        self._step_ends.rotate()
        self._step_ends[0].record()
        return self._step_ends[0]

    def synchronize(self, event: torch.cuda.Event | None) -> None:
        """Returns when everything before the event is done, or everything. Raises CollectiveError if a peer fails."""
        self.parallel.tp_group.synchronize(event)
        if event is not None:
            event.synchronize()

    def _forward(self, batch: ForwardBatch | None) -> torch.Tensor:
        if batch is None:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return self.model.compute_logits(self.model.forward(nothing, nothing, None))
        if self._inputs_copied is not None:
            self._inputs_copied.synchronize()  # of the last step, from memory that planning attention writes again
        inputs = self._input_ids(batch), to_device(batch.positions, self.device)
        attention = self.attention_backend.plan(batch.attention)
        if self._inputs_copied is not None:
            self._inputs_copied.record()
        hidden = self.model.forward(*inputs, attention)
        return self.model.compute_logits(_select(hidden, batch))

    def _input_ids(self, batch: ForwardBatch) -> torch.Tensor:
        input_ids = to_device(batch.input_ids, self.device)
        return input_ids if self.future_tokens is None else self.future_tokens.resolve(input_ids)


class StepOutput(NamedTuple):
    logits: torch.Tensor
    """fp32 [len(logit_rows), vocab]."""
    greedy: torch.Tensor | None = None
    """int64 [len(logit_rows)], where a CUDA graph has found the likeliest tokens, and kept them for the next step."""


def _select(rows: torch.Tensor, batch: ForwardBatch | None) -> torch.Tensor:
    """The rows of a step that logits are wanted for."""
    if batch is None or len(batch.logit_rows) == rows.shape[0]:
        return rows
    return rows[to_device(batch.logit_rows, rows.device)]
