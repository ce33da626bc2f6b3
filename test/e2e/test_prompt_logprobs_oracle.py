"""Log-probabilities of prompts beside transformers in double precision: in chunks, from the cache, over ranks."""

import sys
from pathlib import Path

import pytest
import torch

import nibble

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model.data import heldout

TOP = 3


@pytest.fixture(scope="module")
def prompts(bf16_checkpoint) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bf16_checkpoint)
    texts = [
        tokenizer.apply_chat_template(list(conversation.prompt), tokenize=False)
        for conversation in heldout(5, seed="prompt logprobs")
    ]
    return [tokenizer(text)["input_ids"] for text in texts] + [tokenizer("x")["input_ids"][:1]]


@pytest.fixture(scope="module")
def oracle(bf16_checkpoint, prompts) -> list[torch.Tensor]:
    """For each prompt the log-probabilities of every token behind each of its tokens, `[T, V]`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        bf16_checkpoint, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].log_softmax(dim=-1) for prompt in prompts]


def check(output: dict, prompt: list[int], start: int, logprobs: torch.Tensor) -> None:
    tokens = output["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in tokens] == prompt[start:]
    assert tokens[0][0] is None
    expected = logprobs[range(start, len(prompt) - 1), prompt[start + 1 :]]
    assert [logprob for logprob, _, _ in tokens[1:]] == pytest.approx(expected.tolist(), abs=2e-4)
    for found, row in zip(output["meta_info"]["input_top_logprobs"][1:], logprobs[start:], strict=False):
        assert [logprob for logprob, _, _ in found] == pytest.approx(row.topk(TOP).values.tolist(), abs=2e-4)
    (generated, *_) = output["meta_info"]["output_token_logprobs"]
    assert generated[0] == pytest.approx(float(logprobs[-1, generated[1]]), abs=2e-4)


def test_prompts_are_scored_as_in_double_precision_computed_or_cached(bf16_checkpoint, prompts, oracle):
    ranks = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}
    chunks = {"chunked_prefill_size": 7, "page_size": 4}
    with nibble.Engine(
        model_path=str(bf16_checkpoint), kv_cache_dtype="float32", log_level="warning", **ranks, **chunks
    ) as engine:
        for start in (0, 20):
            asked = [
                (prompt, logprobs) for prompt, logprobs in zip(prompts, oracle, strict=True) if len(prompt) > start
            ]
            outputs = engine.generate(
                input_ids=[prompt for prompt, _ in asked],
                sampling_params={"temperature": 0, "max_new_tokens": 1},
                return_logprob=True,
                logprob_start_len=start,
                top_logprobs_num=TOP,
            )
            for output, (prompt, logprobs) in zip(outputs, asked, strict=True):
                check(output, prompt, start, logprobs)
        assert any(output["meta_info"]["cached_tokens"] for output in outputs), "what lies before is not computed again"
