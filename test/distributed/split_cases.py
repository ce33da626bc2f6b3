"""Splits, rows and small models of `test_splits.py` and its twin on GPUs, and what one rank computes."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from checkpoints import save_qwen3_moe
from nibble.layers.dp_attention import DpPaddingMode
from runners import all_logits, single_rank_runner
from split_ranks import prompt

SIZES = {
    1: [[5]],
    2: [[4, 4], [7, 2], [0, 3], [3, 0]],
    4: [[2, 2, 2, 2], [1, 6, 2, 3], [0, 3, 0, 1], [5, 0, 0, 0]],
}
"""Rows of every attention group: even, uneven, and idle ones."""
MODES = [mode.value for mode in DpPaddingMode]
SPLITS = [(tp, dp, ep) for tp in (1, 2, 4) for dp in (1, 2, 4) for ep in (1, 2, 4) if max(dp, ep) <= tp]
VOCAB = 127
# A vocabulary and a dense width that no number of ranks divides evenly, and biases that count once.
IRREGULAR = {"vocab_size": VOCAB, "intermediate_size": 90, "attention_bias": True, "num_hidden_layers": 2}


def save_irregular_moe(folder: Path) -> Path:
    """Layer 0 is dense, layer 1 has experts."""
    save_qwen3_moe(folder, **IRREGULAR, mlp_only_layers=[0], tie_word_embeddings=False, moe_intermediate_size=30)
    return folder


def cases_of(dp: int, modes: list[str] = MODES) -> list[dict[str, Any]]:
    return [{"sizes": sizes, "mode": mode} for sizes in SIZES[dp] for mode in modes]


@cache
def alone(folder: Path) -> list[torch.Tensor]:
    """A single rank's logits of the prompts of every group."""
    runner = single_rank_runner(folder)
    return all_logits(runner, [prompt(dp_rank, 8) for dp_rank in range(4)])


def relative_errors(results: list[list[dict]], expected: list[torch.Tensor], cases: list[dict], dp: int) -> list[float]:
    """Of each case on each rank with rows: its logits' largest error, relative to the largest logit.

    Ranks of an attention group have the same bits, or they would sample different tokens.
    """
    attn_tp = len(results) // dp
    errors = []
    for number, case in enumerate(cases):
        for rank, size in enumerate(size for size in case["sizes"] for _ in range(attn_tp)):
            logits = results[rank][number]["logits"]
            assert logits == results[rank - rank % attn_tp][number]["logits"], (case, rank)
            wanted = expected[rank // attn_tp][min(size - 1, 1) : size + 1] if size else torch.empty(0, VOCAB)
            ours = torch.tensor(logits).view(-1, VOCAB)
            assert ours.shape == wanted.shape, (case, rank)
            if size:
                errors.append(float((ours - wanted).abs().max() / wanted.abs().max()))
    return errors
