"""DeepSeek-V3 and V2 give the logits of transformers in fp32, however prompts are batched and chunked."""

import pytest
import torch

from checkpoints import YARN, edit_tensors, save_deepseek_v2, save_deepseek_v3, save_qwen3
from nibble.models.deepseek_v3 import MoEGate
from nibble.utils.errors import ConfigError
from runners import all_logits, single_rank_runner

# The long one is 7 * 7 + 1 tokens: in chunks of 7 the last is decoded, at a position that YaRN has stretched.
PROMPTS = [[5, 17, 99], [1], list(range(3, 53)), [7] * 16, [100, 2, 100, 2, 50]]
SHORT = [prompt for prompt in PROMPTS if len(prompt) < 20]
V3, V2 = save_deepseek_v3, save_deepseek_v2
MODELS = {
    "v3": (V3, {}),
    "v3 without q_lora": (V3, {"q_lora_rank": None}),
    "v3 with YaRN": (V3, {"rope_parameters": YARN}),
    "v3 with YaRN, equal magnitudes": (V3, {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}}),
    "v3 with YaRN without magnitudes": (V3, {"rope_parameters": {**YARN, "mscale": None, "mscale_all_dim": None}}),
    "v3 with half-split rotary": (V3, {"rope_interleave": False, "q_lora_rank": None}),
    "v3 with one group": (V3, {"n_group": 1, "topk_group": 1}),
    "v3 with one chosen group": (V3, {"n_group": 3, "topk_group": 1}),
    "v3 without renormalized weights": (V3, {"norm_topk_prob": False, "routed_scaling_factor": 2.5}),
    "v3 with attention bias": (V3, {"attention_bias": True}),
    "v3 with two shared experts and no dense layer": (V3, {"n_shared_experts": 2, "first_k_dense_replace": 0}),
    "v3 with tied embeddings and sizes that fill no vector": (
        V3,
        {"tie_word_embeddings": True, "kv_lora_rank": 20, "qk_rope_head_dim": 12},
    ),
    "v3 with another epsilon in the outer norms": (V3, {"rms_norm_eps": 1e-2}),
    "v2": (V2, {"topk_method": "group_limited_greedy", "rope_parameters": YARN}),
    "v2 lite": (V2, {"topk_method": "greedy", "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree_with_transformers(name, tmp_path):
    save, overrides = MODELS[name]
    reference = save(tmp_path, **overrides)
    runner = single_rank_runner(tmp_path, kv_cache_dtype="float32")
    with torch.inference_mode():
        expected = {tuple(prompt): reference(torch.tensor([prompt])).logits[0] for prompt in PROMPTS}
    for chunk, prompts in ((10**6, PROMPTS), (7, PROMPTS), (1, SHORT)):
        for prompt, ours in zip(prompts, all_logits(runner, prompts, chunk), strict=True):
            torch.testing.assert_close(
                ours,
                expected[tuple(prompt)],
                atol=1e-4,
                rtol=0,
                msg=lambda m, p=prompt, c=chunk: f"{p} in chunks of {c}: {m}",
            )


def test_layers_that_guess_further_tokens_are_skipped_by_name_and_nothing_else_is(tmp_path):
    V3(tmp_path, num_nextn_predict_layers=1)
    expected = all_logits(single_rank_runner(tmp_path), PROMPTS)

    def add(name: str) -> None:
        edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(64, 128)}))

    add("model.layers.2.eh_proj.weight")  # layers 0 and 1 are the model's
    for ours, theirs in zip(all_logits(single_rank_runner(tmp_path), PROMPTS), expected, strict=True):
        assert torch.equal(ours, theirs)
    for name in ("model.layers.1.eh_proj.weight", "model.layers.20.eh_proj.weight"):
        add(name)
        with pytest.raises(ConfigError, match=rf"fit nothing in the model: .*{name}"):
            single_rank_runner(tmp_path)


def test_the_router_computes_in_fp32_from_a_bf16_checkpoint(tmp_path):
    """Two experts of nearly the same score must not change places because of how the engine stores its weights."""
    V3(tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    runner = single_rank_runner(tmp_path, dtype="bfloat16")
    (gate,) = [layer for _, layer in runner.model.layers() if isinstance(layer, MoEGate)]
    x = torch.randn(50, 64, dtype=torch.bfloat16)
    logits = gate(x)
    assert logits.dtype == gate.correction_bias.dtype == torch.float32
    torch.testing.assert_close(logits, (x.double() @ gate.weight.double().T).float(), atol=1e-5, rtol=1e-5)
    assert all_logits(runner, PROMPTS)[2].isfinite().all()


def test_qwen3_stretched_by_yarn_agrees_as_well(tmp_path):
    reference = save_qwen3(tmp_path, rope_parameters={**YARN, "mscale": None, "mscale_all_dim": None})
    (ours,) = all_logits(single_rank_runner(tmp_path), [PROMPTS[2]], chunk=7)
    with torch.inference_mode():
        torch.testing.assert_close(ours, reference(torch.tensor([PROMPTS[2]])).logits[0], atol=1e-4, rtol=0)
