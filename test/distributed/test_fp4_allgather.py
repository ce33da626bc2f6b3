"""The path across ranks: FP4 before or after the gather, even, uneven and idle ranks, any number of them.

Each case runs one forward pass of a small NVFP4 Qwen3-MoE with random weights in one process per rank.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from nibble.distributed.parallel_state import initialize_parallel
from nibble.model_executor.model_runner import ModelRunner
from rank_processes import Rank, RankProcesses
from runners import all_logits, engine_config

SIZES = {
    1: [[5]],
    2: [[4, 4], [7, 2], [0, 3], [3, 0]],
    3: [[2, 2, 2], [5, 1, 3], [0, 4, 1], [4, 0, 1], [4, 1, 0], [0, 0, 2]],
    4: [[2, 2, 2, 2], [1, 6, 2, 3], [0, 3, 0, 1]],
}
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "num_experts": 12,
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


def forward(rank: Rank, folder: str, sizes: list[int], fp4: bool, backend: str) -> dict:
    """One prefill with `sizes[rank]` tokens on each rank; their logits, and what the rank sent to the gathers."""
    torch.set_num_threads(1)
    name = f"runner {fp4} {backend}"
    if name not in rank.state:
        config = engine_config(
            Path(folder),
            load_format="dummy",
            tp_size=rank.world_size,
            dp_size=rank.world_size,
            ep_size=rank.world_size,
            enable_dp_attention=True,
            enable_flashinfer_cutlass_moe=True,
            disable_flashinfer_cutlass_moe_fp4_allgather=not fp4,
            cpu_collectives=backend,
            log_level="error",
        )
        assert config.fp4_allgather.enabled == fp4
        run_dir = rank.run_dir / name.replace(" ", "-")
        run_dir.mkdir(mode=0o700, exist_ok=True)
        rank.state[name] = ModelRunner(config, initialize_parallel(config, rank.rank, run_dir))
    runner = rank.state[name]
    gathers: list[list[list[object]]] = []
    group = runner.parallel.dp_group
    original = type(group).all_gatherv

    def spy(tensors, sizes):
        gathers.append([[str(tensor.dtype), tensor.shape[1]] for tensor in tensors])
        return original(group, tensors, sizes)

    group.all_gatherv = spy
    try:
        mine = prompt(rank.rank, sizes[rank.rank])
        if mine:
            (logits,) = all_logits(runner, [mine], global_num_tokens=sizes)
        else:
            logits = runner.forward(None, sizes)
    finally:
        del group.all_gatherv
    return {
        "bits": hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest(),
        "logits": logits.tolist(),
        "gathers": gathers,
    }


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


def test_each_partial_sum_is_reduced_exactly_once_for_even_uneven_and_idle_ranks(ranks, checkpoint):
    """Reducing twice multiplies the experts' output, not at all loses other ranks' experts; both are far off."""
    alone = single_rank_logits(checkpoint, ranks.world_size)
    for sizes in cases(ranks):
        results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=True, backend="shared_memory")
        for rank, (result, size) in enumerate(zip(results, sizes, strict=True)):
            if size:
                ours, expected = torch.tensor(result["logits"]), alone[rank][:size]
                # Sums over ranks round differently, and FP4 turns some of that into steps of its own.
                assert float((ours - expected).norm() / expected.norm()) < 0.05, (sizes, rank)


def test_one_packed_buffer_travels_per_layer_not_a_list(ranks, checkpoint):
    sizes = cases(ranks)[0]
    for fp4, expected in (
        (True, [["torch.uint8", 32 + 4 + 16 + 16 + 12]]),  # values, scales, ids, weights, padding
        (False, [["torch.float32", 64], ["torch.int32", 4], ["torch.float32", 4]]),
    ):
        results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=fp4, backend="shared_memory")
        for result in results:
            assert result["gathers"] == [expected] * 3, "one gather in each of the three layers"


def test_an_idle_rank_enters_every_collective(ranks, checkpoint):
    """It would hang or be refused otherwise; and it enters as many as the busy ones."""
    for sizes in cases(ranks):
        results = ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=True, backend="shared_memory")
        assert len({len(result["gathers"]) for result in results}) == 1


def single_rank_logits(folder: Path, world_size: int) -> list[torch.Tensor]:
    config = engine_config(folder, load_format="dummy", log_level="error", enable_flashinfer_cutlass_moe=True)
    runner = ModelRunner(config, initialize_parallel(config, 0, folder))
    return [all_logits(runner, [prompt(rank, 8)])[0] for rank in range(world_size)]
