"""Steps that overlap on a GPU give the tokens of steps that are waited for."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nibble

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model.data import heldout

pytestmark = pytest.mark.gpu

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
COUNT = 64
NEAR_TIE = 1.0
"""Natural-log probability between the two likeliest tokens; a batch of another size may choose the other."""
PENALIZED = {"temperature": 0, "repetition_penalty": 1.1, "frequency_penalty": 0.1}
KINDS = [
    {"temperature": 0},
    PENALIZED,
    {"temperature": 0, "min_new_tokens": 20},
    {"temperature": 0, "ignore_eos": True},
]


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
        log_level="warning",
        **flags,
    )


def answers(engine: nibble.Engine) -> list[dict]:
    prompts = [engine.tokenizer.apply_chat_template(conversation.prompt) for conversation in heldout(COUNT)]
    sampling = [{**KINDS[index % len(KINDS)], "max_new_tokens": 40} for index in range(COUNT)]
    order = random.Random(0).sample(range(COUNT), COUNT)
    outputs = engine.generate(
        input_ids=[prompts[i] for i in order],
        sampling_params=[sampling[i] for i in order],
        return_logprob=True,
        top_logprobs_num=2,
    )
    return [output for _, output in sorted(zip(order, outputs, strict=True), key=lambda pair: pair[0])]


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def expected(ranks) -> Iterator[list[dict]]:
    with start(ranks, max_total_tokens=65536, disable_overlap_schedule=True) as engine:
        assert not engine.config.overlap_schedule
        yield answers(engine)


@pytest.mark.parametrize(
    "flags",
    [
        {"max_total_tokens": 65536},
        {"max_total_tokens": 65536, "disable_cuda_graph": True},
        {"max_total_tokens": 65536, "chunked_prefill_size": 16},
        {"max_total_tokens": 1024},  # requests are retracted all the time
    ],
    ids=["as it comes", "without graphs", "in chunks", "a tiny cache"],
)
def test_overlap_changes_no_answer(ranks, expected, flags):
    with start(ranks, **flags) as engine:
        assert engine.config.overlap_schedule
        found = answers(engine)
    same = total = 0
    differing = []
    for index, (right, output) in enumerate(zip(expected, found, strict=True)):
        a, b = right["output_ids"], output["output_ids"]
        position = next((i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]), None)
        same, total = same + (len(a) if position is None else position), total + len(a)
        if position is None:
            assert output["meta_info"]["finish_reason"] == right["meta_info"]["finish_reason"]
        elif KINDS[index % len(KINDS)] is not PENALIZED:  # log-probabilities are the model's, before penalties
            best, runner_up = right["meta_info"]["output_top_logprobs"][position][:2]
            differing.append((best[0] - runner_up[0], right["text"], output["text"]))
    assert all(gap < NEAR_TIE for gap, *_ in differing), differing
    assert same >= 0.9 * total, f"{same} of {total} tokens before a difference; {differing}"
