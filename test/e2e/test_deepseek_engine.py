"""A DeepSeek model in the whole engine: its configuration reaches the ranks, its latent vectors the prefix cache."""

import shutil
import sys
from pathlib import Path

import pytest

import nibble
from server_process import DEMO_MODEL

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model.families import deepseek_config
from tools.demo_model.tokenizer import TOKENIZER_FILES

GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
PROMPTS = [[(7 * i + 3 * j) % 800 + 3 for j in range(length)] for i, length in enumerate((5, 40, 150))]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Two ranks, random weights in fp32: no FP4 rounding that could turn the last bit into another token."""
    folder = tmp_path_factory.mktemp("deepseek")
    config = deepseek_config()
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    ranks = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}
    with nibble.Engine(
        model_path=str(folder), load_format="dummy", kv_cache_dtype="float32", log_level="warning", **ranks
    ) as engine:
        yield engine


def test_requests_together_and_on_any_rank_get_the_tokens_they_get_alone(engine):
    alone = [engine.generate(input_ids=prompt, sampling_params=GREEDY)["output_ids"] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    together = engine.generate(input_ids=PROMPTS, sampling_params=GREEDY)
    assert [output["output_ids"] for output in together] == alone
    for rank in (0, 1):
        moved = engine.generate(input_ids=PROMPTS[1], sampling_params=GREEDY, data_parallel_rank=rank)
        assert (moved["output_ids"], moved["meta_info"]["dp_rank"]) == (alone[1], rank)


def test_cached_latent_vectors_give_the_tokens_that_computed_ones_give(engine):
    prompt = [9, *PROMPTS[2]]
    first, second = (engine.generate(input_ids=prompt, sampling_params=GREEDY, data_parallel_rank=1) for _ in range(2))
    assert (first["meta_info"]["cached_tokens"], second["meta_info"]["cached_tokens"]) == (0, 144)
    assert second["output_ids"] == first["output_ids"]
