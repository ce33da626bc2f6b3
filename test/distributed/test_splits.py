"""Every way to split a model over 1, 2 or 4 ranks gives the logits of one rank.

For all sizes of attention groups (dp) and expert groups (ep) that divide the ranks (tp): even, uneven and idle
groups, both padding modes, a prefill and a decode step. The processes of each number of ranks serve all cases.
"""

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from checkpoints import quantize_to_nvfp4, save_qwen3, save_qwen3_moe
from nibble.config.resolve import EngineConfig
from nibble.layers.dp_attention import DpPaddingMode
from rank_processes import RankProcesses
from runners import all_logits, engine_config, single_rank_runner
from split_ranks import prompt, run_cases

SIZES = {
    1: [[5]],
    2: [[4, 4], [7, 2], [0, 3], [3, 0]],
    4: [[2, 2, 2, 2], [1, 6, 2, 3], [0, 3, 0, 1], [5, 0, 0, 0]],
}
"""Rows of every attention group: even, uneven, and idle ones."""
MODES = [mode.value for mode in DpPaddingMode]
SPLITS = [(tp, dp, ep) for tp in (1, 2, 4) for dp in (1, 2, 4) for ep in (1, 2, 4) if max(dp, ep) <= tp]
DENSE_SPLITS = [(tp, dp) for tp in (1, 2, 4) for dp in (1, 2, 4) if dp <= tp]
# A vocabulary and a dense width that no number of ranks divides evenly, and biases that count once.
IRREGULAR = {"vocab_size": 127, "intermediate_size": 90, "attention_bias": True, "num_hidden_layers": 2}
LAYERS = 2


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_qwen3(folder, **IRREGULAR)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """Layer 0 is dense, layer 1 has experts."""
    folder = tmp_path_factory.mktemp("moe")
    save_qwen3_moe(folder, **IRREGULAR, mlp_only_layers=[0], tie_word_embeddings=False, moe_intermediate_size=30)
    return folder


@pytest.fixture(scope="module")
def nvfp4_moe(tmp_path_factory) -> Path:
    """Experts of 5 blocks, a dense layer of 6: shares of 4 ranks are uneven. Gate and up have scales of their own."""
    folder = tmp_path_factory.mktemp("nvfp4")
    sizes = {"vocab_size": 127, "num_hidden_layers": 2, "mlp_only_layers": [0], "moe_intermediate_size": 80}
    save_qwen3_moe(folder, **sizes)
    return quantize_to_nvfp4(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Iterator[dict[int, RankProcesses]]:
    """The processes for each number of ranks; they start when they are first used."""
    processes = {tp: RankProcesses(tp, tmp_path_factory.mktemp(f"ranks{tp}")) for tp in (1, 2, 4)}
    yield processes
    for group in processes.values():
        group.close()


def run(
    ranks: dict[int, RankProcesses], folder: Path, tp: int, dp: int, ep: int, cases: list[dict], **args: Any
) -> list[list[dict]]:
    """The results of every rank for every case."""
    args = {"tp_size": tp, "dp_size": dp, "ep_size": ep, **args}
    return ranks[tp].run(run_cases, folder=str(folder), args=args, cases=cases)


def cases_of(dp: int, modes: list[str] = MODES) -> list[dict[str, Any]]:
    return [{"sizes": sizes, "mode": mode} for sizes in SIZES[dp] for mode in modes]


@cache
def alone(folder: Path) -> list[torch.Tensor]:
    """A single rank's logits of the prompts of every group."""
    runner = single_rank_runner(folder)
    return all_logits(runner, [prompt(dp_rank, 8) for dp_rank in range(4)])


def assert_logits_of_one_rank(
    results: list[list[dict]], folder: Path, cases: list[dict], dp: int, tolerance: float = 1e-4
) -> None:
    attn_tp = len(results) // dp
    for rank, of_rank in enumerate(results):
        for case, result in zip(cases, of_rank, strict=True):
            size = case["sizes"][rank // attn_tp]
            ours = torch.tensor(result["logits"])
            if size == 0:
                assert len(ours) == 0, (case, rank)
                continue
            first = 1 if size > 1 else 0
            expected = alone(folder)[rank // attn_tp][first : size + 1]
            assert ours.shape == expected.shape
            assert float((ours - expected).abs().max()) <= tolerance * max(1, float(expected.abs().max())), (case, rank)


@pytest.mark.parametrize(("tp", "dp", "ep"), SPLITS)
def test_every_split_of_a_model_with_experts_gives_the_logits_of_one_rank(ranks, moe, tp, dp, ep):
    cases = cases_of(dp)
    assert_logits_of_one_rank(run(ranks, moe, tp, dp, ep, cases), moe, cases, dp)


@pytest.mark.parametrize(("tp", "dp"), DENSE_SPLITS)
def test_every_split_of_a_dense_model_gives_the_logits_of_one_rank(ranks, dense, tp, dp):
    cases = cases_of(dp, modes=MODES[:1])
    assert_logits_of_one_rank(run(ranks, dense, tp, dp, 1, cases), dense, cases, dp)
