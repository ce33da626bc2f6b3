"""Steps that overlap on a GPU give the tokens of steps that are waited for."""

import random
from functools import cache
from pathlib import Path

import pytest
from tools.demo_model.data import heldout

import nibble

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
COUNT = 64
LENGTH = 40
NEAR_TIE = 1.0
"""Natural-log probability between the two likeliest tokens; a batch of another size may choose the other."""
GREEDY = {"temperature": 0}
PENALIZED = {"temperature": 0, "repetition_penalty": 1.1, "frequency_penalty": 0.1}
KEPT_FROM_ENDING = {"temperature": 0, "min_new_tokens": 20}
ENDLESS = {"temperature": 0, "ignore_eos": True}
KINDS = [GREEDY, PENALIZED, KEPT_FROM_ENDING, ENDLESS]
LARGE = {"max_total_tokens": 65536}


def start(ranks: int, **flags: object) -> nibble.Engine:
    return nibble.Engine(
        model_path=str(DEMO_MODEL),
        device="cuda",
        tp_size=ranks,
        dp_size=ranks,
        ep_size=ranks,
        enable_dp_attention=True,
        enable_flashinfer_cutlass_moe=True,
        context_length=512,
        cuda_graph_max_bs=32,  # fewer than run at first: steps with and without a graph
        log_level="warning",
        **flags,
    )


def answers(engine: nibble.Engine) -> list[dict]:
    prompts = [engine.tokenizer.apply_chat_template(conversation.prompt) for conversation in heldout(COUNT)]
    sampling = [{**KINDS[index % len(KINDS)], "max_new_tokens": LENGTH} for index in range(COUNT)]
    order = random.Random(0).sample(range(COUNT), COUNT)
    outputs = engine.generate(
        input_ids=[prompts[i] for i in order],
        sampling_params=[sampling[i] for i in order],
        return_logprob=True,
        top_logprobs_num=2,
    )
    return [output for _, output in sorted(zip(order, outputs, strict=True), key=lambda pair: pair[0])]


@cache
def answers_without_overlap(ranks: int) -> list[dict]:
    with start(ranks, **LARGE, disable_overlap_schedule=True) as engine:
        assert not engine.config.overlap_schedule
        return answers(engine)


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(1, LARGE, id="one rank"),
        pytest.param(1, {"max_total_tokens": 1024}, id="one rank, a tiny cache"),  # requests are retracted all the time
        pytest.param(2, LARGE | {"disable_cuda_graph": True}, id="two ranks, without graphs"),
        pytest.param(2, LARGE | {"chunked_prefill_size": 16}, id="two ranks, in chunks"),
    ],
)
def test_overlap_changes_no_answer(ranks: int, flags: dict[str, object]) -> None:
    expected = answers_without_overlap(ranks)
    with start(ranks, **flags) as engine:
        assert engine.config.overlap_schedule
        found = answers(engine)
    same = total = 0
    for index, (right, output) in enumerate(zip(expected, found, strict=True)):
        kind, texts = KINDS[index % len(KINDS)], (right["text"], output["text"])
        a, b = right["output_ids"], output["output_ids"]
        position = next((i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]), None)
        if kind is ENDLESS:
            assert len(b) == LENGTH, texts
        elif kind is KEPT_FROM_ENDING:
            assert len(b) >= 20, texts
        else:  # the others leave what the model has learnt behind them, where it is sure of nothing
            same, total = same + (len(a) if position is None else position), total + len(a)
        if position is None:
            assert output["meta_info"]["finish_reason"] == right["meta_info"]["finish_reason"]
        elif kind in (GREEDY, ENDLESS):  # log-probabilities are the model's, before penalties and bans
            best, runner_up = right["meta_info"]["output_top_logprobs"][position][:2]
            assert best[0] - runner_up[0] < NEAR_TIE, texts
    assert same >= 0.95 * total, f"{same} of {total} tokens before a difference"
