"""Decoding steps as CUDA graphs: one replay instead of a launch for every kernel.

There is a graph for each of a few numbers of rows. In a step all ranks replay that of the smallest number which holds
the rows of the fullest rank, so sizes are even and every rank enters the same collectives. Rows beyond a rank's own are
padding: token 0 at position 0, which attends to the pool's padding page alone and is routed to no expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from nibble.distributed.parallel_state import ParallelState
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch, GraphAttentionBackend, GraphAttentionStep
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.future_tokens import FutureTokens
from nibble.models.registry import CausalLM


class CudaGraphRunner:
    """Owns the memory that graphs read and write; it stays where it is from capture to the last replay."""

    def __init__(
        self,
        model: CausalLM,
        pool: KvCachePool,
        attention_backend: GraphAttentionBackend,
        parallel: ParallelState,
        graph_rows: Sequence[int],
        context_length: int,
        future_tokens: FutureTokens | None,
        show_progress: bool,
    ) -> None:
        """Captures a graph for each of `graph_rows`, ascending. Collective: every rank captures the same."""
        self.model, self.pool, self.parallel = model, pool, parallel
        self.future_tokens = future_tokens
        self.graph_rows = tuple(graph_rows)
        largest = self.graph_rows[-1]
        device = pool.device
        # Token ids, positions and the number of rows that are no padding: one copy to the device a step.
        self._host_inputs = torch.zeros(2 * largest + 1, dtype=torch.int64, pin_memory=True)
        self._inputs_copied = torch.cuda.Event()
        self._inputs = torch.zeros(2 * largest + 1, dtype=torch.int64, device=device)
        self._row_index = torch.arange(largest, device=device)[:, None]  # [largest, 1]
        self._graphs: dict[int, _Graph] = {}
        max_pages = -(-context_length // pool.page_size)
        memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        # The largest first: the others find their memory in what it leaves.
        for rows in tqdm(self.graph_rows[::-1], desc="Capturing CUDA graphs", disable=not show_progress):
            attention = attention_backend.graph_step(rows, rows * max_pages)
            self._graphs[rows] = self._capture(rows, attention, stream, memory)

    def rows_for(self, most_rows: int) -> int | None:
        """The graph for a step whose fullest rank has `most_rows`; None where there is none that large."""
        return next((rows for rows in self.graph_rows if rows >= most_rows), None)

    def replay(self, rows: int, batch: ForwardBatch | None) -> torch.Tensor:
        """fp32 logits `[sequences, vocab]` of a batch with one row a sequence, which the next replay overwrites.

        Collective, as all graphs are: an idle rank has None.
        """
        graph = self._graphs[rows]
        self._set_inputs(graph, batch)
        graph.graph.replay()
        return graph.logits[: len(batch.input_ids) if batch else 0]

    def run_eagerly(self, rows: int, batch: ForwardBatch | None) -> torch.Tensor:
        """What `replay` does, launched kernel by kernel, to compare it with."""
        graph = self._graphs[rows]
        self._set_inputs(graph, batch)
        return self._forward(rows, graph.attention)[: len(batch.input_ids) if batch else 0]

    def _capture(self, rows: int, attention: GraphAttentionStep, stream: torch.cuda.Stream, memory: Any) -> "_Graph":
        captured = _Graph(rows, attention)
        self._set_inputs(captured, None)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(rows, attention)  # compiles what this number of rows needs; capturing cannot
            self.parallel.tp_group.synchronize()
            with torch.cuda.graph(captured.graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                captured.logits = self._forward(rows, attention)
        torch.cuda.current_stream().wait_stream(stream)
        return captured

    def _set_inputs(self, graph: "_Graph", batch: ForwardBatch | None) -> None:
        rows, largest = graph.rows, self.graph_rows[-1]
        filled = len(batch.input_ids) if batch else 0
        self._inputs_copied.synchronize()  # of the last step, from the same memory
        inputs = self._host_inputs
        inputs.zero_()
        if batch is not None:
            inputs[:filled] = torch.tensor(batch.input_ids)
            inputs[largest : largest + filled] = torch.tensor(batch.positions)
        inputs[-1] = filled
        self._inputs.copy_(inputs, non_blocking=True)
        if self.future_tokens is not None:
            self._inputs[:filled] = self.future_tokens.resolve(self._inputs[:filled])
        graph.attention.plan(self._padded(batch.attention if batch else AttentionBatch([], [], []), rows))
        self._inputs_copied.record()

    def _padded(self, batch: AttentionBatch, rows: int) -> AttentionBatch:
        padding = rows - len(batch.seq_lens)
        return AttentionBatch(
            query_lens=[1] * rows,
            seq_lens=[*batch.seq_lens, *[1] * padding],
            page_tables=[*batch.page_tables, *[[self.pool.padding_page]] * padding],
        )

    def _forward(self, rows: int, attention: GraphAttentionStep) -> torch.Tensor:
        largest = self.graph_rows[-1]
        is_padding = self._row_index[:rows] >= self._inputs[-1]
        sizes = (rows,) * self.parallel.dp_group.world_size
        with dp_step(DpStep(self.parallel, sizes, sizes, is_padding)):
            hidden = self.model.forward(self._inputs[:rows], self._inputs[largest : largest + rows], attention)
            return self.model.compute_logits(hidden)


class _Graph:
    """The graph for `rows` rows, and what it reads and writes."""

    def __init__(self, rows: int, attention: GraphAttentionStep) -> None:
        self.rows, self.attention = rows, attention
        self.graph = torch.cuda.CUDAGraph()
        self.logits = torch.empty(0)  # [rows, vocab] once captured
