"""Qwen3 and Qwen3-MoE give the logits of transformers in fp32, however prompts are batched and chunked."""

import pytest
import torch

from checkpoints import old_spelling, save_qwen3, save_qwen3_moe
from runners import all_logits, single_rank_runner

PROMPTS = [[5, 17, 99], [1], list(range(3, 40)), [7] * 16, [100, 2, 100, 2, 50]]

MODELS = {
    "qwen3": (save_qwen3, {}),
    "qwen3 with tied embeddings and attention bias": (
        save_qwen3,
        {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3 with one key head": (save_qwen3, {"num_key_value_heads": 1, "rope_parameters": {"rope_theta": 777.0}}),
    "qwen3 with a key head for every query head": (save_qwen3, {"num_key_value_heads": 4}),
    "qwen3 with three query heads to a key head": (save_qwen3, {"num_attention_heads": 6}),
    "qwen3 with heads that fill no vector": (save_qwen3, {"head_dim": 20, "num_key_value_heads": 1}),
    "qwen3-moe": (save_qwen3_moe, {}),
    "qwen3-moe without renormalized weights": (
        save_qwen3_moe,
        {"norm_topk_prob": False, "tie_word_embeddings": False},
    ),
    "qwen3-moe with dense layers between": (save_qwen3_moe, {"decoder_sparse_step": 2}),
    "qwen3-moe with one dense layer": (save_qwen3_moe, {"mlp_only_layers": [1]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_transformers(name, tmp_path):
    save, overrides = MODELS[name]
    reference = save(tmp_path, **overrides)
    runner = single_rank_runner(tmp_path)
    with torch.inference_mode():
        expected = [reference(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    for chunk in (10**6, 7, 1):
        for prompt, ours, theirs in zip(PROMPTS, all_logits(runner, PROMPTS, chunk), expected, strict=True):
            torch.testing.assert_close(
                ours, theirs, atol=1e-4, rtol=0, msg=lambda m, p=prompt, c=chunk: f"{p} in chunks of {c}: {m}"
            )


def save_bf16(save, folder):
    """Saves a BF16 checkpoint; returns transformers' model of it in fp32."""
    model = save(folder).to(torch.bfloat16)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("save", [save_qwen3, save_qwen3_moe])
def test_a_bf16_checkpoint_gives_the_logits_of_its_weights_in_fp32(save, tmp_path):
    reference = save_bf16(save, tmp_path)
    runner = single_rank_runner(tmp_path, kv_cache_dtype="float32")
    with torch.inference_mode():
        expected = [reference(torch.tensor([prompt])).logits[0] for prompt in PROMPTS]
    for chunk in (10**6, 7, 1):
        for ours, theirs in zip(all_logits(runner, PROMPTS, chunk), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_the_cache_of_a_bf16_checkpoint_is_bf16_and_costs_little(tmp_path):
    save_bf16(save_qwen3, tmp_path)
    exact, usual = single_rank_runner(tmp_path, kv_cache_dtype="float32"), single_rank_runner(tmp_path)
    assert (exact.config.kv_cache_dtype, usual.config.kv_cache_dtype) == ("float32", "bfloat16")
    for theirs, ours in zip(all_logits(exact, PROMPTS), all_logits(usual, PROMPTS), strict=True):
        assert 0 < float((ours - theirs).norm()) < 0.01 * float(theirs.norm()) or len(ours) == 1


def test_config_in_the_spelling_of_older_transformers(tmp_path):
    save_qwen3_moe(tmp_path, rope_parameters={"rope_theta": 555.0})
    new = single_rank_runner(tmp_path)
    old_spelling(tmp_path)
    old = single_rank_runner(tmp_path)
    assert old.config.model == new.config.model
    assert old.config.model.rope_theta == 555.0
    assert torch.equal(all_logits(old, PROMPTS)[2], all_logits(new, PROMPTS)[2])
