"""DeepSeek, small but with the sizes of R1's latent attention, for which FlashInfer has a kernel, beside the CPU."""

import json
from pathlib import Path

import torch

from nibble.distributed.parallel_state import initialize_parallel
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner
from runners import all_logits, engine_config

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 256, "mscale_all_dim": 1.0},
}
PROMPTS = [[5, 17, 99], [1], list(range(3, 300)), [7] * 16]


def make_runner(folder: Path, config: dict[str, object], **args: object) -> ModelRunner:
    """With random weights, which are the same on every device."""
    (folder / "config.json").write_text(json.dumps(config))
    engine = engine_config(folder, load_format="dummy", max_total_tokens=2048, log_level="error", **args)
    return ModelRunner(engine, initialize_parallel(engine, 0, folder))


def make_quantized_runner(folder: Path, backend: str) -> ModelRunner:
    excluded = ["lm_head", "model.layers.*.mlp.gate"]
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": excluded}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return make_runner(folder, CONFIG, device="cuda", attention_backend=backend, cuda_graph_max_bs=4)


def assert_logits_of_the_cpu(folder: Path, backend: str) -> None:
    """Without experts and FP4, where a rounding can change a choice or a code and with it everything behind."""
    dense = CONFIG | {"n_routed_experts": None}
    on_cpu = all_logits(make_runner(folder, dense, device="cpu"), PROMPTS, chunk=100)
    runner = make_runner(folder, dense, device="cuda", attention_backend=backend, disable_cuda_graph=True)
    for chunk in (10**6, 100):
        for ours, theirs in zip(all_logits(runner, PROMPTS, chunk), on_cpu, strict=True):
            assert float((ours.cpu() - theirs).norm() / theirs.norm()) < 0.03, chunk


def assert_a_graph_is_bit_equal_to_its_kernels(folder: Path, backend: str) -> None:
    """Shared experts on their second stream, grouped routing and latent attention included."""
    runner = make_quantized_runner(folder, backend)
    graphs = runner._graphs
    assert graphs is not None
    assert all(logits.isfinite().all() for logits in all_logits(runner, PROMPTS, chunk=100))
    for rows in (1, 3, 4):
        lengths = [30 + 7 * row for row in range(rows)]
        tables = [list(range(25 * row, 25 * row + 25)) for row in range(rows)]
        batch = ForwardBatch(
            input_ids=[11 * row + 3 for row in range(rows)],
            positions=[length - 1 for length in lengths],
            attention=AttentionBatch([1] * rows, lengths, tables),
            logit_rows=list(range(rows)),
        )
        graph_rows = graphs.rows_for(rows)
        assert graph_rows is not None
        with torch.inference_mode():
            replayed = graphs.replay(graph_rows, batch).logits.clone()
            assert torch.equal(replayed, graphs.run_eagerly(graph_rows, batch).logits)
        assert replayed.isfinite().all()
