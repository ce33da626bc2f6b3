"""What each rank does for test_cuda_graphs.py."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from nibble.distributed.communicator import CollectiveError
from nibble.distributed.parallel_state import initialize_parallel
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner
from rank_processes import Rank
from runners import engine_config

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
LARGEST = 8
PAGE_SIZE = 4
PAGES_EACH = 10


def check_replays(
    rank: Rank, sizes: list[list[int]], moe_comm: str, combine: str = "bf16", hosts: dict[str, Any] | None = None
) -> None:
    """Decodes `sizes[…][rank]` sequences: replayed, launched kernel by kernel with padding, and without any.

    The first two must be the same bits. The third has other shapes, which the order of sums may depend on.
    With the flags of several `hosts`, neighbours play one.
    """
    runner = _runner(rank, moe_comm, combine=combine, hosts=hosts)
    graphs = runner._graphs
    assert graphs is not None
    _prefill(runner, rank)
    for step, rows in enumerate(sizes):
        batch = _decode(rows[rank.rank], length=20 + step, first_token=rank.rank * 50 + step)
        graph_rows = graphs.rows_for(max(rows))
        assert graph_rows is not None
        with torch.inference_mode():
            output = graphs.replay(graph_rows, batch)
            assert torch.equal(output.greedy, output.logits.argmax(dim=-1))
            replayed = output.logits.clone()
            eager = graphs.run_eagerly(graph_rows, batch).logits.clone()
        runner.parallel.tp_group.synchronize()
        assert torch.equal(replayed, eager), f"rank {rank.rank}, rows {rows}: a graph differs from what it captured"
        unpadded = runner.forward(batch, rows)
        assert replayed.shape == unpadded.shape
        torch.testing.assert_close(replayed, unpadded, rtol=0.05, atol=0.25)
        through_forward = runner.forward(batch, rows, decodes_only=True)
        assert torch.equal(replayed, through_forward)


def miss_the_last_rank(rank: Rank, hosts: Sequence[dict[str, Any]] = ({}, {})) -> str:
    """The last rank stays away from a replay through peer memory. Returns what the others' wait for it raises.

    By then all of them leave the GPU alone: nothing waits on it when their processes end. `hosts`: the flags of
    several, which meet twice.
    """
    first, second = hosts
    _runner(rank, "peer", hosts=first)  # compiles and loads, which may take longer than the next one's kernels wait
    runner = _runner(rank, "peer", dist_timeout=10.0, hosts=second)
    _prefill(runner, rank)
    rows = [2] * rank.world_size
    runner.forward(_decode(2, length=20, first_token=0), rows, decodes_only=True)
    runner.parallel.cpu_group.barrier()
    if rank.rank == rank.world_size - 1:
        return ""
    try:
        runner.forward(_decode(2, length=21, first_token=0), rows, decodes_only=True)
        runner.synchronize(None)  # steps overlap: launching one waits for nobody
    except CollectiveError as error:
        torch.cuda.synchronize()
        return str(error)
    return "no error"


def _runner(
    rank: Rank,
    moe_comm: str,
    dist_timeout: float = 60.0,
    combine: str = "bf16",
    hosts: dict[str, Any] | None = None,
) -> ModelRunner:
    name = f"runner-{moe_comm}-{dist_timeout:g}-{combine}{'-hosts' if hosts else ''}"
    if name not in rank.state:
        config = engine_config(
            DEMO_MODEL,
            device="cuda",
            page_size=PAGE_SIZE,
            max_total_tokens=2048,
            cuda_graph_max_bs=LARGEST,
            tp_size=rank.world_size,
            dp_size=rank.world_size,
            ep_size=rank.world_size,
            enable_dp_attention=True,
            enable_flashinfer_cutlass_moe=True,
            moe_comm_backend=moe_comm,
            moe_combine_dtype=combine,
            dist_timeout=dist_timeout,
            log_level="error",
            **(hosts or {}),
        )
        assert config.cuda_graph_rows == (1, 2, 4, 8)
        run_dir = rank.run_dir / f"{name}-of-node{config.parallel.node_of(rank.rank)}"  # hosts share no files
        run_dir.mkdir(mode=0o700, exist_ok=True)
        rank.state[name] = ModelRunner(config, initialize_parallel(config, rank.rank, run_dir))
    runner: ModelRunner = rank.state[name]
    return runner


def _prefill(runner: ModelRunner, rank: Rank) -> None:
    """20 tokens of each of the sequences."""
    count, length = LARGEST, 20
    batch = ForwardBatch(
        input_ids=[(token * 7 + rank.rank) % 800 + 3 for token in range(count * length)],
        positions=list(range(length)) * count,
        attention=AttentionBatch([length] * count, [length] * count, [_pages(i) for i in range(count)]),
        logit_rows=[],
    )
    runner.forward(batch, [count * length] * rank.world_size)


def _decode(count: int, length: int, first_token: int) -> ForwardBatch | None:
    if count == 0:
        return None
    attention = AttentionBatch([1] * count, [length + 1] * count, [_pages(i) for i in range(count)])
    tokens = [(first_token + 31 * i) % 800 + 3 for i in range(count)]
    return ForwardBatch(tokens, [length] * count, attention, list(range(count)))


def _pages(sequence: int) -> list[int]:
    return list(range(sequence * PAGES_EACH, (sequence + 1) * PAGES_EACH))
