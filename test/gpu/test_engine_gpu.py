"""The engine on a GPU: the FP4 gather changes no bit, and the demo model answers as it does on the CPU."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from tools.demo_model.data import heldout

import nibble
import test_fp4_allgather as on_cpu
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]
checkpoint = on_cpu.checkpoint

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
SIZES = {**on_cpu.SIZES, 8: [[2] * 8, [3, 1, 6, 2, 9, 4, 1, 5], [0, 4, 1, 0, 2, 0, 3, 1]]}
COUNT = 200
NEAR_TIE = 1.0
"""Natural-log probability between the two likeliest tokens; BF16 activations and FP4 round by up to a few percent."""


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def ranks(request, tmp_path_factory) -> Iterator[RankProcesses]:
    with gpu_ranks(request.param, tmp_path_factory, timeout_s=170) as processes:
        yield processes


def forward(ranks, checkpoint, sizes, fp4, moe_comm, combine="bf16"):
    arguments = {"folder": str(checkpoint), "sizes": sizes, "backend": "shared_memory", "device": "cuda"}
    arguments["combine"] = combine
    return ranks.run(on_cpu.forward, fp4=fp4, moe_comm=moe_comm if ranks.world_size > 1 else "auto", **arguments)


@pytest.mark.parametrize("moe_comm", ["nccl", "peer"])
def test_fp4_gather_on_and_off_give_the_same_bits(ranks, checkpoint, moe_comm):
    if ranks.world_size == 1 and moe_comm == "peer":
        pytest.skip("one rank has no peers")
    for sizes in SIZES[ranks.world_size]:
        on, off = (forward(ranks, checkpoint, sizes, fp4, moe_comm) for fp4 in (True, False))
        assert [result["bits"] for result in on] == [result["bits"] for result in off], sizes
        for result, size in zip(on, sizes, strict=True):
            assert len(result["logits"]) == size
            assert torch.tensor(result["logits"]).isfinite().all()


def test_peer_memory_and_nccl_differ_by_the_rounding_of_sums_only(ranks, checkpoint):
    """NCCL may round to bf16 after each term, peer memory rounds once."""
    if ranks.world_size == 1:
        pytest.skip("one rank has no peers")
    for sizes in SIZES[ranks.world_size]:
        through_nccl, through_peers = (forward(ranks, checkpoint, sizes, True, backend) for backend in ("nccl", "peer"))
        for a, b in zip(through_nccl, through_peers, strict=True):
            torch.testing.assert_close(torch.tensor(a["logits"]), torch.tensor(b["logits"]), rtol=0.05, atol=0.05)


def test_results_in_fp8_give_the_same_bits_on_both_backends_and_with_fp4_on_and_off(ranks, checkpoint):
    """FP8 rows are summed in rank order, whatever brings them.

    Beside results in BF16, a rounding may change an FP4 code or the choice of an expert, and with it all behind.
    """
    if ranks.world_size != 4:
        pytest.skip("one size is enough")
    for sizes in SIZES[ranks.world_size]:
        through_nccl = forward(ranks, checkpoint, sizes, True, "nccl", "fp8")
        through_peers, off = (forward(ranks, checkpoint, sizes, fp4, "peer", "fp8") for fp4 in (True, False))
        assert [r["bits"] for r in through_nccl] == [r["bits"] for r in through_peers] == [r["bits"] for r in off], (
            sizes
        )
        ours, expected = (
            torch.cat([torch.tensor(result["logits"]) for result in results if result["logits"]])
            for results in (through_peers, forward(ranks, checkpoint, sizes, True, "peer"))
        )
        assert ours.shape == expected.shape and (ours - expected).norm() <= 0.2 * expected.norm(), sizes


@cache
def answers(device: str, ranks: int, moe_comm: str = "auto") -> list[dict]:
    with nibble.Engine(
        model_path=str(DEMO_MODEL),
        device=device,
        tp_size=ranks,
        dp_size=ranks,
        ep_size=ranks,
        enable_dp_attention=True,
        enable_flashinfer_cutlass_moe=True,
        moe_comm_backend=moe_comm,
        max_total_tokens=65536,
        cuda_graph_max_bs=16,
        log_level="warning",
    ) as engine:
        prompts = [engine.tokenizer.apply_chat_template(conversation.prompt) for conversation in heldout(COUNT)]
        sampling = {"temperature": 0, "max_new_tokens": 64}
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True, top_logprobs_num=2)
    assert {output["meta_info"]["dp_rank"] for output in outputs} == set(range(ranks))
    return outputs


@pytest.mark.parametrize(("num_ranks", "moe_comm"), [(1, "auto"), (2, "nccl"), (2, "peer"), (4, "auto"), (8, "auto")])
def test_the_answers_are_those_of_the_cpu_but_for_near_ties(num_ranks, moe_comm):
    same = total = 0
    for expected, found in zip(answers("cpu", 1), answers("cuda", num_ranks, moe_comm), strict=True):
        a, b = expected["output_ids"], found["output_ids"]
        position = next((i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]), len(a))
        same, total = same + position, total + len(a)
        if position < len(a):
            best, runner_up, *_ = expected["meta_info"]["output_top_logprobs"][position]
            assert best[0] - runner_up[0] < NEAR_TIE, (expected["text"], found["text"])
            assert b[position : position + 1] == [runner_up[1]], (expected["text"], found["text"])
    print(f"{num_ranks} ranks, {moe_comm}: {same} of {total} tokens before a difference")
    assert same >= 0.99 * total


def test_sampled_tokens_repeat_with_the_seed_and_penalties_apply_on_the_gpu():
    sampling = {
        "temperature": 0.9, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1,
        "frequency_penalty": 0.1, "sampling_seed": 7, "max_new_tokens": 24, "min_new_tokens": 4,
        "logit_bias": {"5": -2.0},
    }  # fmt: skip
    with nibble.Engine(model_path=str(DEMO_MODEL), device="cuda", cuda_graph_max_bs=2, log_level="warning") as engine:
        assert engine.config.num_pages is None, "the KV cache takes what the weights leave"
        prompt = engine.tokenizer.apply_chat_template([{"role": "user", "content": "What is 17 plus 25?"}])
        first, second = (engine.generate(input_ids=prompt, sampling_params=sampling)["output_ids"] for _ in range(2))
    assert first == second and len(first) >= 4
