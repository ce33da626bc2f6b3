"""Every way to split a model over 1, 2 or 4 ranks gives the logits of one rank.

For all sizes of attention groups (dp) and expert groups (ep) that divide the ranks (tp): even, uneven and idle
groups, both padding modes, a prefill and a decode step. The processes of each number of ranks serve all cases.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from checkpoints import quantize_to_nvfp4, save_qwen3, save_qwen3_moe
from nibble.layers.dp_attention import DpPaddingMode
from rank_processes import RankProcesses, free_port
from runners import engine_config
from split_cases import IRREGULAR, MODES, SIZES, SPLITS, VOCAB, alone, cases_of, relative_errors, save_irregular_moe
from split_ranks import groups_of, run_cases

DENSE_SPLITS = [(tp, dp) for tp, dp, ep in SPLITS if ep == 1]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    save_qwen3(folder, **IRREGULAR)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    return save_irregular_moe(tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def nvfp4_moe(tmp_path_factory) -> Path:
    """Experts of 5 blocks, a dense layer of 6: shares of 4 ranks are uneven. Gate and up have scales of their own."""
    folder = tmp_path_factory.mktemp("nvfp4")
    sizes = {"vocab_size": VOCAB, "num_hidden_layers": 2, "mlp_only_layers": [0], "moe_intermediate_size": 80}
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


@pytest.mark.parametrize(("tp", "dp", "ep"), SPLITS)
def test_every_split_of_a_model_with_experts_gives_the_logits_of_one_rank(ranks, moe, tp, dp, ep):
    cases = cases_of(dp)
    assert max(relative_errors(run(ranks, moe, tp, dp, ep, cases), alone(moe), cases, dp)) < 1e-4


@pytest.mark.parametrize(("tp", "dp"), DENSE_SPLITS)
def test_every_split_of_a_dense_model_gives_the_logits_of_one_rank(ranks, dense, tp, dp):
    cases = cases_of(dp, modes=MODES[:1])
    assert max(relative_errors(run(ranks, dense, tp, dp, 1, cases), alone(dense), cases, dp)) < 1e-4


@pytest.mark.parametrize(("tp", "dp", "ep"), [split for split in SPLITS if split[0] > 1])
def test_every_split_of_an_nvfp4_model_gives_the_logits_of_one_rank_but_for_rounding(ranks, nvfp4_moe, tp, dp, ep):
    """Sums of other terms round differently, and where that moves a value across a rounding boundary of FP4, more."""
    cases = cases_of(dp)
    errors = relative_errors(run(ranks, nvfp4_moe, tp, dp, ep, cases), alone(nvfp4_moe), cases, dp)
    assert max(errors) < 0.05
    assert median(errors) < 1e-5


@pytest.mark.parametrize(
    "options", [{"enable_dp_lm_head": True}, {"moe_dense_tp_size": 1}, {"cpu_collectives": "gloo"}]
)
@pytest.mark.parametrize(("tp", "dp", "ep"), [(2, 1, 1), (2, 2, 1), (4, 2, 2)])
def test_options_of_a_split_change_no_logits(ranks, moe, tp, dp, ep, options):
    cases = cases_of(dp)
    assert max(relative_errors(run(ranks, moe, tp, dp, ep, cases, **options), alone(moe), cases, dp)) < 1e-4


def several(nnodes: int) -> dict[str, Any]:
    """The flags of that many hosts; their ranks are those of `ranks`, and share no files."""
    return {"nnodes": nnodes, "dist_init_addr": f"127.0.0.1:{free_port() - 1}"}


@pytest.mark.parametrize(("tp", "dp", "ep", "nnodes"), [(2, 2, 2, 2), (4, 4, 4, 2), (4, 4, 4, 4), (4, 2, 4, 2)])
def test_ranks_on_several_hosts_give_the_same_bits_as_on_one(ranks, nvfp4_moe, tp, dp, ep, nnodes):
    """Also with attention groups of two, whose second ranks meet in a group without rank 0, which serves the store."""
    cases: list[dict[str, Any]] = [{"sizes": sizes} for sizes in SIZES[dp]]
    args = {"tp_size": tp, "dp_size": dp, "ep_size": ep, "enable_flashinfer_cutlass_moe": True}
    gathers_fp4 = engine_config(nvfp4_moe, enable_dp_attention=True, **args).fp4_allgather.enabled
    assert gathers_fp4 == (dp == ep)
    on_one, on_several = (
        ranks[tp].run(run_cases, folder=str(nvfp4_moe), args={**args, **hosts}, cases=cases)
        for hosts in ({}, several(nnodes))
    )
    assert str(on_several) == str(on_one), "logits by their shortest representation, and the collectives entered"


def test_ranks_of_one_host_meet_in_its_memory_and_those_of_several_over_gloo(ranks, moe):
    args = {"tp_size": 4, "dp_size": 2, "ep_size": 2, **several(2)}
    for rank, groups in enumerate(ranks[4].run(groups_of, folder=str(moe), args=args)):
        assert groups["tp"] == groups["cpu"] == ["GlooCommunicator", [0, 1, 2, 3]]
        assert groups["dp"] == ["GlooCommunicator", [0, 2] if rank % 2 == 0 else [1, 3]]
        assert groups["attn_tp"] == ["SharedMemoryCommunicator", [0, 1] if rank < 2 else [2, 3]]


def test_attention_groups_of_a_dense_model_on_several_hosts_never_meet(ranks, dense):
    """Nor do they need the address to answer: nobody opens it."""
    args = {"tp_size": 4, "dp_size": 2, "ep_size": 1, **several(2)}
    for rank, groups in enumerate(ranks[4].run(groups_of, folder=str(dense), args=args)):
        expected = ["SharedMemoryCommunicator", [0, 1] if rank < 2 else [2, 3]]
        assert groups["tp"] == groups["cpu"] == groups["attn_tp"] == expected


def collectives_of_a_step(tp: int, dp: int, mode: str, has_rows: bool) -> list[str]:
    """In the order of the model: embedding, a dense layer and one with experts, lm_head. Nothing else travels."""
    attn_tp = tp // dp
    inside, across = ("tp" if dp == 1 else "attn_tp"), ("tp" if dp == tp else "dp")
    own_sum = [f"all_reduce in {inside}"] if attn_tp > 1 and has_rows else []
    gather = [f"all_gatherv in {across}"] if dp > 1 else []
    if mode == DpPaddingMode.MAX_LEN.value:
        combine = ["reduce_scatter in tp"] + ([f"all_gather in {inside}"] if attn_tp > 1 else [])
    else:
        combine = ["reduce_scatterv in tp"] if attn_tp == 1 else ["all_reduce in tp"]
    embedding, attention, dense = own_sum, own_sum, own_sum
    return [*embedding, *attention, *dense, *attention, *gather, *combine, *gather, "all_gather in tp"]


@pytest.mark.parametrize(("tp", "dp", "ep"), [split for split in SPLITS if split[0] > 1])
def test_what_was_reduced_once_is_not_reduced_again_at_the_boundary(ranks, moe, tp, dp, ep):
    """Experts that all-reduced before rows were reduce-scattered collapsed accuracy. Each sum has one owner."""
    cases = cases_of(dp)
    for rank, results in enumerate(run(ranks, moe, tp, dp, ep, cases)):
        for case, result in zip(cases, results, strict=True):
            has_rows = case["sizes"][rank * dp // tp] > 0
            assert result["collectives"] == 2 * collectives_of_a_step(tp, dp, case["mode"], has_rows), (case, rank)


@pytest.mark.parametrize("sizes", [[4, 4], [7, 2], [0, 3]])
def test_no_padding_mode_leaves_the_experts_sum_untaken(ranks, moe, sizes):
    """A mode that only uneven groups choose went without the reduction, and nobody saw it on even ones."""
    cases: list[dict[str, Any]] = [{"sizes": sizes, "mode": mode} for mode in [*MODES, None]]
    results = run(ranks, moe, 4, 2, 1, cases)
    assert max(relative_errors(results, alone(moe), cases, dp=2)) < 1e-4
    reductions = [
        [name for name in of_case["collectives"] if name in ("all_reduce in tp", "reduce_scatter in tp")]
        for of_case in results[0]
    ]
    assert [len(names) for names in reductions] == [2, 2, 2]
    assert reductions[0] != reductions[1], "the modes are different paths"
