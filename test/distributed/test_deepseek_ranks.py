"""DeepSeek across ranks: the shared expert on the rows of its attention group, the routed ones on those of all.

Forward passes of small models with random weights in one process per rank, as in test_fp4_allgather.py and
test_splits.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from checkpoints import save_deepseek_v3
from rank_processes import RankProcesses
from split_cases import IRREGULAR, MODES, alone, cases_of, relative_errors
from split_ranks import run_cases
from test_fp4_allgather import assert_agree, forward, single_rank_logits

SIZES = {2: [[4, 4], [7, 2], [0, 3], [3, 0]], 4: [[2, 2, 2, 2], [1, 6, 2, 3], [0, 3, 0, 1]]}
"""Rows of every rank: even, uneven and idle."""
MOE_LAYERS = 2
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1 + MOE_LAYERS,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
    "routed_scaling_factor": 2.5,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "model.layers.*.mlp.gate"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return folder


@pytest.fixture(scope="module", params=list(SIZES))
def ranks(request, tmp_path_factory) -> Iterator[RankProcesses]:
    with RankProcesses(request.param, tmp_path_factory.mktemp("ranks")) as processes:
        yield processes


def test_fp4_gather_on_and_off_give_the_same_bits_and_those_of_a_single_rank_but_for_rounding(ranks, checkpoint):
    alone = single_rank_logits(checkpoint, ranks.world_size)
    for sizes in SIZES[ranks.world_size]:
        on, off = (
            ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=fp4, backend="shared_memory")
            for fp4 in (True, False)
        )
        assert [result["bits"] for result in on] == [result["bits"] for result in off], sizes
        assert_agree(on, alone, sizes)


def test_only_routed_experts_make_ranks_meet(ranks, checkpoint):
    """Attention, dense layers and the shared expert have all that they need; the shared expert is not summed either."""
    for sizes in SIZES[ranks.world_size]:
        for result in ranks.run(forward, folder=str(checkpoint), sizes=sizes, fp4=True, backend="shared_memory"):
            assert result["collectives"] == ["all_gatherv", "reduce_scatterv"] * MOE_LAYERS, sizes


@pytest.fixture(scope="module")
def irregular(tmp_path_factory) -> Path:
    """Layer 0 is dense, layer 1 has experts; no number of ranks divides the widths evenly."""
    folder = tmp_path_factory.mktemp("irregular")
    save_deepseek_v3(folder, **IRREGULAR, moe_intermediate_size=30)
    return folder


SPLITS = {
    2: [(1, 1, {}), (1, 2, {}), (2, 1, {}), (1, 2, {"moe_dense_tp_size": 1})],
    4: [(1, 2, {}), (2, 1, {}), (4, 2, {}), (2, 4, {"moe_dense_tp_size": 1})],
}
"""By ranks: attention groups, expert groups, and options."""


def test_heads_and_the_shared_expert_may_be_split_over_ranks(ranks, irregular):
    """Every rank of an attention group has all latent vectors. What the group has in parts is summed once: the shared
    expert together with the residual, and with it the routed experts, which every rank has whole.
    """
    for dp, ep, options in SPLITS[ranks.world_size]:
        cases = cases_of(dp, MODES)
        args = {"tp_size": ranks.world_size, "dp_size": dp, "ep_size": ep, "kv_cache_dtype": "float32", **options}
        results = ranks.run(run_cases, folder=str(irregular), args=args, cases=cases)
        assert max(relative_errors(results, alone(irregular), cases, dp)) < 1e-4, (dp, ep, options)
