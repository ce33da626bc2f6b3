"""The engine on a GPU: the demo model answers as it does on the CPU."""

from functools import cache
from pathlib import Path

import pytest
from tools.demo_model.data import heldout

import nibble

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
COUNT = 200
NEAR_TIE = 1.0
"""Natural-log probability between the two likeliest tokens; BF16 activations and FP4 round by up to a few percent."""


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
