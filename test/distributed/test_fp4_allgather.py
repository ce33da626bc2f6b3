"""The path across ranks: FP4 before or after the gather, even, uneven and idle ranks, any number of them.

Each case runs one forward pass of a small NVFP4 Qwen3-MoE with random weights in one process per rank.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from nibble.distributed.communicator import Communicator
from nibble.distributed.parallel_state import initialize_parallel
from nibble.model_executor.model_runner import ModelRunner
from nibble.models.qwen3 import Qwen3Attention
from nibble.scheduler.rank_statistics import moe_traffic
from rank_processes import Rank, RankProcesses
from runners import all_logits, engine_config

SIZES = {
    1: [[5]],
    2: [[4, 4], [7, 2], [0, 3], [3, 0]],
    3: [[2, 2, 2], [5, 1, 3], [0, 4, 1], [4, 0, 1], [4, 1, 0], [0, 0, 2]],
    4: [[2, 2, 2, 2], [1, 6, 2, 3], [0, 3, 0, 1], [2, 0, 5, 1], [1, 1, 4, 0]],
}
"""Rows of every rank: even, uneven, and every rank idle in turn."""
COLLECTIVES = (
    "all_reduce", "all_gather", "all_gatherv", "reduce_scatter", "reduce_scatterv", "all_to_allv", "broadcast",
    "barrier",
)  # fmt: skip
LAYERS = 3
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "num_experts": 24,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
BACKENDS = ("shared_memory", "gloo")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return folder


@pytest.fixture(scope="module", params=list(SIZES))
def ranks(request, tmp_path_factory) -> Iterator[RankProcesses]:
    with RankProcesses(request.param, tmp_path_factory.mktemp("ranks")) as processes:
        yield processes


def prompt(rank: int, length: int) -> list[int]:
    return [(7 * rank + 3 * position) % 120 + 1 for position in range(length)]


def forward(
    rank: Rank,
    folder: str,
    sizes: list[int],
    fp4: bool,
    backend: str,
    device: str = "cpu",
    moe_comm: str = "auto",
    combine: str = "bf16",
) -> dict:
    """One prefill with `sizes[rank]` tokens on each rank: the rank's logits, and what it did for them."""
    torch.set_num_threads(1)
    runner = shared_runner(rank, Path(folder), fp4, backend, device, moe_comm, combine)
    mine = prompt(rank.rank, sizes[rank.rank])
    with recorded_collectives(runner.parallel.dp_group) as collectives, recorded_attention() as attention_rows:
        if mine:
            (logits,) = all_logits(runner, [mine], global_num_tokens=sizes)
        else:
            logits = runner.forward(None, sizes)
    logits = logits.cpu()
    return {
        "bits": hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest(),
        "logits": logits.tolist(),
        "collectives": [name for name, _ in collectives],
        "gathers": [tensors for name, tensors in collectives if name == "all_gatherv"],
        "exchanged": [tensor for name, tensors in collectives if name == "all_to_allv" for tensor in tensors],
        "bytes_back": moe_traffic(runner.config, (layer for _, layer in runner.model.layers())).combine,
        "attention_rows": attention_rows,
    }


def shared_runner(
    rank: Rank, folder: Path, fp4: bool, backend: str, device: str, moe_comm: str, combine: str
) -> ModelRunner:
    """The runner of all tests with these arguments, one after the other."""
    name = f"runner {fp4} {backend} {device} {moe_comm} {combine}"
    if name not in rank.state:
        config = engine_config(
            folder,
            load_format="dummy",
            tp_size=rank.world_size,
            dp_size=rank.world_size,
            ep_size=rank.world_size,
            enable_dp_attention=True,
            enable_flashinfer_cutlass_moe=True,
            disable_flashinfer_cutlass_moe_fp4_allgather=not fp4,
            cpu_collectives=backend,
            device=device,
            moe_comm_backend=moe_comm,
            moe_combine_dtype=combine,
            log_level="error",
        )
        assert config.fp4_allgather.enabled == fp4
        run_dir = rank.run_dir / name.replace(" ", "-")
        run_dir.mkdir(mode=0o700, exist_ok=True)
        rank.state[name] = ModelRunner(config, initialize_parallel(config, rank.rank, run_dir))
    runner: ModelRunner = rank.state[name]
    return runner


@contextmanager
def recorded_collectives(group: Communicator) -> Iterator[list[tuple[str, list[list[object]]]]]:
    """Every collective that the rank enters, with dtype and width of each tensor that it brings."""
    entered: list[tuple[str, list[list[object]]]] = []

    def recording(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> Any:
            brought = arguments[0] if arguments and isinstance(arguments[0], list) else arguments[:1]
            entered.append((name, [[str(tensor.dtype), tensor.shape[1]] for tensor in brought]))
            return collective(*arguments)

        return record

    with ExitStack() as patches:
        for name in COLLECTIVES:
            patches.enter_context(mock.patch.object(group, name, recording(name, getattr(group, name))))
        yield entered


@contextmanager
def recorded_attention() -> Iterator[list[int]]:
    """The rows that attention gets in each layer."""
    rows: list[int] = []
    original = Qwen3Attention.__call__

    def record(self: Qwen3Attention, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        rows.append(len(x))
        return original(self, x, *arguments)

    with mock.patch.object(Qwen3Attention, "__call__", record):
        yield rows


def cases(processes: RankProcesses) -> list[list[int]]:
    return SIZES[processes.world_size]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp4_gather_on_and_off_give_the_same_bits(ranks, checkpoint, backend):
    for sizes in cases(ranks):
        on = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=True, backend=backend)
        off = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=False, backend=backend)
        assert [result["bits"] for result in on] == [result["bits"] for result in off], sizes
        for result, size in zip(on, sizes, strict=True):
            assert len(result["logits"]) == size


def test_the_backends_give_the_same_bits(ranks, checkpoint):
    """Both sum in rank order."""
    for sizes in cases(ranks):
        results = [
            ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=True, backend=backend) for backend in BACKENDS
        ]
        assert [r["bits"] for r in results[0]] == [r["bits"] for r in results[1]], sizes


@pytest.mark.parametrize("fp4", [True, False])
def test_the_experts_output_is_not_reduced_again_after_its_one_reduce_scatter(ranks, checkpoint, fp4):
    """And nothing else travels: the sizes came with the step."""
    for sizes in cases(ranks):
        for result in ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=fp4, backend="shared_memory"):
            assert result["collectives"] == ["all_gatherv", "reduce_scatterv"] * LAYERS, sizes


@pytest.mark.parametrize("fp4", [True, False])
def test_the_experts_output_is_reduced_on_even_uneven_and_idle_ranks_alike(ranks, checkpoint, fp4):
    """Without it the experts of other ranks would be missing."""
    alone = single_rank_logits(checkpoint, ranks.world_size)
    for sizes in cases(ranks):
        results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=fp4, backend="shared_memory")
        assert_agree(results, alone, sizes)


def test_results_in_fp8_give_the_same_bits_with_fp4_on_and_off_and_on_both_backends(ranks, checkpoint):
    """Whoever quantizes them, and whatever brings them back: FP8 rows are summed in rank order."""
    if ranks.world_size not in (2, 3):
        pytest.skip("one rank has nobody to send to, and two numbers are enough")
    alone = single_rank_logits(checkpoint, ranks.world_size)
    for sizes in cases(ranks):
        in_fp8 = {"folder": str(checkpoint), "sizes": sizes, "combine": "fp8"}
        on, off, by_tcp = (
            ranks.run(forward, fp4=fp4, backend=backend, **in_fp8)
            for fp4, backend in ((True, "shared_memory"), (False, "shared_memory"), (True, "gloo"))
        )
        assert [r["bits"] for r in on] == [r["bits"] for r in off] == [r["bits"] for r in by_tcp], sizes
        assert_agree(on, alone, sizes, within=0.1)
        for result in (*on, *off):
            assert result["collectives"] == ["all_gatherv", "all_to_allv"] * LAYERS, sizes
            assert result["exchanged"] == [["torch.uint8", 64 + 4 + 12]] * LAYERS  # values, a scale, padding
            assert result["bytes_back"] == LAYERS * 80, "as the metrics count them"


def test_one_packed_buffer_travels_per_layer_not_a_list(ranks, checkpoint):
    sizes = cases(ranks)[0]
    for fp4, expected in (
        (True, [["torch.uint8", 32 + 4 + 16 + 16 + 12]]),  # values, scales, ids, weights, padding
        (False, [["torch.float32", 64], ["torch.int32", 4], ["torch.float32", 4]]),
    ):
        results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=fp4, backend="shared_memory")
        for result in results:
            assert result["gathers"] == [expected] * LAYERS


def test_an_idle_rank_enters_every_collective_that_its_peers_enter(ranks, checkpoint):
    for sizes in cases(ranks):
        results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=True, backend="shared_memory")
        assert len({tuple(result["collectives"]) for result in results}) == 1, sizes


def test_zero_rows_on_each_rank_in_turn_leave_the_others_their_logits(ranks, checkpoint):
    alone = single_rank_logits(checkpoint, ranks.world_size)
    for empty in range(ranks.world_size):
        sizes = [0 if rank == empty else 3 + rank for rank in range(ranks.world_size)]
        for fp4 in (True, False):
            results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=fp4, backend="shared_memory")
            assert results[empty]["logits"] == []
            assert_agree(results, alone, sizes)


def test_no_rank_pads_its_rows_to_the_sum_over_all_ranks_before_attention(ranks, checkpoint):
    for sizes in cases(ranks):
        results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=True, backend="shared_memory")
        for result, size in zip(results, sizes, strict=True):
            assert result["attention_rows"] == ([size] * LAYERS if size else []), sizes


def single_rank_logits(folder: Path, world_size: int) -> list[torch.Tensor]:
    config = engine_config(folder, load_format="dummy", log_level="error", enable_flashinfer_cutlass_moe=True)
    runner = ModelRunner(config, initialize_parallel(config, 0, folder))
    return [all_logits(runner, [prompt(rank, 8)])[0] for rank in range(world_size)]


def assert_agree(results: list[dict], alone: list[torch.Tensor], sizes: list[int], within: float = 0.05) -> None:
    """The logits of every rank are those of a single rank."""
    for rank, (result, size) in enumerate(zip(results, sizes, strict=True)):
        if size:
            ours, expected = torch.tensor(result["logits"]), alone[rank][:size]
            # Sums over ranks round differently, and FP4 turns some of that into steps of its own.
            assert float((ours - expected).norm() / expected.norm()) < within, (sizes, rank)
