"""Trains the demo model from nothing on one GPU in minutes and asks it the held-out questions.

    python -m tools.demo_model.train --output build/nibble-demo-6m-bf16 --record assets/nibble-demo-6m-bf16.json
    python -m tools.demo_model.train --family deepseek --output build/nibble-demo-deepseek-3m-bf16 \
        --record assets/nibble-demo-deepseek-3m-bf16.json

writes a BF16 checkpoint as transformers stores it, and the record of its answers. The last quarter of the
steps rounds weights and activations to NVFP4 in the forward pass, so that quantizing costs no accuracy.
"""

import argparse
import datetime
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from .batches import Batches, Bucket, held_out_buckets, training_buckets
from .data import heldout
from .evaluate import answers_of_transformers, load, print_accuracy, write_record
from .families import FAMILIES, new_model
from .nvfp4 import round_to_nvfp4
from .routing import Routed, balance_loss, balances_by_bias, correct_biases, recorded_routing
from .tokenizer import END_OF_MESSAGE, END_OF_TEXT, build_tokenizer

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 200
QUANTIZED_FROM = 0.75
"""The share of the steps after which the forward pass rounds to NVFP4."""
TOKENS_PER_STEP = 32768
RECORDED_QUESTIONS = 2000

Rounding = Callable[[Tensor], Tensor]
Experts: TypeAlias = Qwen3MoeExperts | DeepseekV3Experts


# ---- The forward pass in training ----


def exact(x: Tensor) -> Tensor:
    return x


def through_nvfp4(x: Tensor) -> Tensor:
    """`x` rounded to NVFP4, with the gradient of the identity (straight-through estimator)."""
    with torch.no_grad():
        rounded = round_to_nvfp4(x, x.abs().amax())
    return x + (rounded - x).detach()


def rounded_linear(linear: nn.Linear, rounding: Rounding, x: Tensor) -> Tensor:
    return F.linear(rounding(x), rounding(linear.weight))


def dense_experts(experts: Experts, rounding: Rounding, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """All experts for all tokens as two matrix products; those not chosen weigh zero.

    The same function as the expert loop of transformers, without its launches: `x` [T, H], `topk_ids` and
    `topk_weights` [T, K], `gate_up_proj` [E, 2I, H], `down_proj` [E, H, I]. Returns [T, H].
    """
    gate_up, down = rounding(experts.gate_up_proj), rounding(experts.down_proj)
    weights = torch.zeros(x.shape[0], gate_up.shape[0], dtype=topk_weights.dtype, device=x.device)
    weights = weights.scatter(1, topk_ids, topk_weights)  # [T, E]
    gate, up = F.linear(rounding(x), gate_up.flatten(0, 1)).unflatten(-1, gate_up.shape[:2]).chunk(2, dim=-1)
    hidden = rounding(F.silu(gate) * up) * weights.unsqueeze(-1)  # [T, E, I]
    return F.linear(hidden.flatten(1), down.transpose(0, 1).flatten(1)).to(x.dtype)


def install_training_forward(model: PreTrainedModel, rounding: Rounding) -> None:
    """Replaces the forward pass of what NVFP4 quantizes: attention projections, feed-forward layers and experts."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(rounded_linear, module, rounding)  # type: ignore[method-assign]
        elif isinstance(module, Experts):
            module.forward = partial(dense_experts, module, rounding)


def logits_of(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, list[Routed]]:
    """Logits [B, L, V], and what each router said, of `tokens` [B, L], padded on the right."""
    with recorded_routing(model) as routed:
        output = model.model(input_ids=tokens, use_cache=False)
    return model.lm_head(output.last_hidden_state), routed


class TrainingLoss(NamedTuple):
    """Of a batch of rows: the loss to minimize and its answer part alone, and how its tokens were routed."""

    total: Tensor
    answers: Tensor
    routed: list[Routed]
    valid: Tensor  # [T], false for padding


def training_loss(model: PreTrainedModel, bucket: Bucket) -> TrainingLoss:
    inputs, targets = bucket.tokens[:, :-1], bucket.tokens[:, 1:]
    weights = bucket.loss_weights[:, 1:].flatten()
    logits, routed = logits_of(model, inputs)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    answers = (losses * weights).sum() / weights.sum()
    valid = (inputs != model.config.pad_token_id).flatten()
    total = answers
    if not balances_by_bias(model):
        total = total + balance_loss([said.logits for said in routed], valid, model.config.num_experts_per_tok)
    return TrainingLoss(total, answers.detach(), routed, valid)


@torch.no_grad()
def share_answered(model: PreTrainedModel, buckets: Iterable[Bucket]) -> float:
    """Share of rows whose every answer token is the likeliest one: what greedy decoding would get right."""
    right = []
    for bucket in buckets:
        logits, _ = logits_of(model, bucket.tokens[:, :-1])
        correct = logits.argmax(dim=-1) == bucket.tokens[:, 1:]
        right.append((correct | (bucket.loss_weights[:, 1:] < 1)).all(dim=1))
    return float(torch.cat(right).float().mean())


# ---- The run ----


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LEARNING_RATE * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: PreTrainedModel,
    batches: Iterator[Bucket],
    validation: Iterable[Bucket],
    steps: int,
    log_every: int,
) -> None:
    """Trains `model` in place; prints the loss and the share of validation questions answered."""
    device = model.device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")
    quantized_from = round(steps * QUANTIZED_FROM)
    install_training_forward(model, exact)
    start = time.monotonic()
    for step in range(steps):
        if step == quantized_from:
            install_training_forward(model, through_nvfp4)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with autocast():
            loss = training_loss(model, next(batches))
        loss.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if balances_by_bias(model):
            correct_biases(model, loss.routed, loss.valid)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            with autocast():
                answered = share_answered(model, validation)
            print(
                f"step {step + 1}/{steps}  loss {loss.answers.item():.4f}  all {loss.total.item():.4f}  "
                f"validation {answered:.1%}  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def save_checkpoint(model: PreTrainedModel, directory: Path) -> None:
    """Writes the model in BF16 with the tokenizer and the tokens that end an answer."""
    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([END_OF_MESSAGE, END_OF_TEXT]),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    for parameter in model.parameters():  # the biases of routers are none, and stay in fp32
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3", help="architecture (default: qwen3)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the BF16 checkpoint")
    parser.add_argument("--record", type=Path, help="JSON file for the answers to the held-out questions")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--conversations", type=int, default=640_000)
    parser.add_argument("--workers", type=int, default=16, help="processes that prepare the conversations")
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--log-every", type=int, default=500)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = build_tokenizer()
    start = time.monotonic()
    buckets = training_buckets(args.conversations, args.workers)
    sizes = {length: bucket.tokens.shape[0] for length, bucket in buckets.items()}
    print(f"{args.conversations} conversations in {time.monotonic() - start:.0f} s, rows by length {sizes}")

    config = FAMILIES[args.family].config()
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = new_model(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}", flush=True)
    train(
        model,
        Batches({length: bucket.to(device) for length, bucket in buckets.items()}, args.tokens_per_step),
        [bucket.to(device) for bucket in held_out_buckets(500, seed="validation").values()],
        args.steps,
        args.log_every,
    )
    save_checkpoint(model, args.output)

    conversations = heldout(RECORDED_QUESTIONS)
    answers = answers_of_transformers(*load(args.output), conversations)
    print_accuracy(conversations, answers)
    if args.record:
        machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
        write_record(
            args.record,
            conversations,
            answers,
            command=f"python -m tools.demo_model.train {shlex.join(sys.argv[1:])}",
            machine=f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}",
            date=datetime.date.today().isoformat(),
        )


if __name__ == "__main__":
    main()
