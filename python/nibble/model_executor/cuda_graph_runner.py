"""Decoding steps as CUDA graphs: one replay instead of a launch for every kernel.

There is a graph for each of a few numbers of rows. In a step all ranks replay that of the smallest number which holds
the rows of the fullest rank, so sizes are even and every rank enters the same collectives. Rows beyond a rank's own are
padding: token 0 at position 0, which attends to the pool's padding page alone and is routed to no expert.

A graph goes from token to token: it begins with those that the step before has left on the device, and leaves there the
likeliest of each row.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from nibble.distributed.parallel_state import ParallelState
from nibble.kv_cache.pool import KvCachePool
from nibble.layers.attention.backend import AttentionBatch, GraphAttentionBackend, GraphAttentionStep
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.future_tokens import FutureTokens
from nibble.models.registry import CausalLM
from nibble.utils.transfer import StagedTensor


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
        argmax: Callable[[torch.Tensor], torch.Tensor],
        show_progress: bool,
    ) -> None:
        """Captures a graph for each of `graph_rows`, ascending. Collective: every rank captures the same.

        `argmax` as `kernels.torch.sampling.argmax`.
        """
        self.model, self.pool, self.parallel = model, pool, parallel
        self.future_tokens, self.argmax = future_tokens, argmax
        self.graph_rows = tuple(graph_rows)
        largest = self.graph_rows[-1]
        device = pool.device
        self._inputs = StagedTensor(1 + 3 * largest, torch.int64, device)
        self._inputs_copied = torch.cuda.Event()
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

    def replay(self, rows: int, batch: ForwardBatch | None, slots: Sequence[int] = ()) -> "GraphOutput":
        """Of a batch with one row a sequence; the next replay overwrites it.

        The next step finds the likeliest token of each row in `slots`, if there are any. Collective, as all graphs are:
        an idle rank has None.
        """
        graph = self._graphs[rows]
        self._set_inputs(graph, batch, slots)
        graph.graph.replay()
        return graph.output.first(len(batch.input_ids) if batch else 0)

    def run_eagerly(self, rows: int, batch: ForwardBatch | None) -> "GraphOutput":
        """What `replay` does, launched kernel by kernel, to compare it with."""
        graph = self._graphs[rows]
        self._set_inputs(graph, batch)
        return self._forward(graph).first(len(batch.input_ids) if batch else 0)

    def _capture(self, rows: int, attention: GraphAttentionStep, stream: torch.cuda.Stream, memory: Any) -> "_Graph":
        captured = _Graph(self._inputs.tensor, rows, attention)
        self._set_inputs(captured, None)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(captured)  # compiles what this number of rows needs; capturing cannot
            self.parallel.tp_group.synchronize()
            with torch.cuda.graph(captured.graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                captured.output = self._forward(captured)
        torch.cuda.current_stream().wait_stream(stream)
        return captured

    def _set_inputs(self, graph: "_Graph", batch: ForwardBatch | None, slots: Sequence[int] = ()) -> None:
        rows = graph.rows
        filled = len(batch.input_ids) if batch else 0
        self._inputs_copied.synchronize()  # of the last step, from the same memory
        values = self._inputs.values[: 1 + 3 * rows]
        values[0] = filled
        values[1 : 1 + 2 * rows] = 0
        if batch is not None:
            values[1 : 1 + filled] = batch.input_ids
            values[1 + rows : 1 + rows + filled] = batch.positions
        if self.future_tokens is not None:
            values[1 + 2 * rows :] = self.future_tokens.no_slot
            values[1 + 2 * rows : 1 + 2 * rows + len(slots)] = slots
        self._inputs.send(len(values))
        graph.attention.plan(self._padded(batch.attention if batch else AttentionBatch([], [], []), rows))
        self._inputs_copied.record()

    def _padded(self, batch: AttentionBatch, rows: int) -> AttentionBatch:
        padding = rows - len(batch.seq_lens)
        return AttentionBatch(
            query_lens=[1] * rows,
            seq_lens=[*batch.seq_lens, *[1] * padding],
            page_tables=[*batch.page_tables, *[[self.pool.padding_page]] * padding],
        )

    def _forward(self, graph: "_Graph") -> "GraphOutput":
        is_padding = self._row_index[: graph.rows] >= graph.num_rows
        sizes = (graph.rows,) * self.parallel.dp_group.world_size
        future = self.future_tokens
        input_ids = graph.input_ids if future is None else future.resolve(graph.input_ids)
        with dp_step(DpStep(self.parallel, sizes, sizes, is_padding)):
            hidden = self.model.forward(input_ids, graph.positions, graph.attention)
            logits = self.model.compute_logits(hidden)
        greedy = self.argmax(logits)
        if future is not None:
            future.store(graph.slots, greedy)
        return GraphOutput(logits, greedy)


class GraphOutput(NamedTuple):
    logits: torch.Tensor  # fp32 [rows, vocab]
    greedy: torch.Tensor  # int64 [rows], their argmax

    def first(self, rows: int) -> "GraphOutput":
        return GraphOutput(self.logits[:rows], self.greedy[:rows])


class _Graph:
    """The graph for `rows` rows, and what it reads and writes."""

    def __init__(self, inputs: torch.Tensor, rows: int, attention: GraphAttentionStep) -> None:
        """`inputs`: how many rows are no padding, token ids, positions, and slots for the tokens to come."""
        self.rows, self.attention = rows, attention
        self.num_rows = inputs[0]
        self.input_ids, self.positions, self.slots = inputs[1 : 1 + 3 * rows].split(rows)
        self.graph = torch.cuda.CUDAGraph()
        self.output: GraphOutput  # once captured
