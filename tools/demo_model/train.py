"""Trains the demo model from nothing on one GPU in minutes and asks it the held-out questions.

    python -m tools.demo_model.train --output build/nibble-demo-6m-bf16 --record assets/nibble-demo-6m-bf16.json

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

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from .batches import Batches, Bucket, held_out_buckets, training_buckets
from .data import heldout
from .evaluate import answers_of_transformers, load, print_accuracy, write_record
from .nvfp4 import round_to_nvfp4
from .tokenizer import END_OF_MESSAGE, END_OF_TEXT, MAX_LENGTH, VOCAB_SIZE, build_tokenizer

LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
WARMUP_STEPS = 200
QUANTIZED_FROM = 0.75
"""The share of the steps after which the forward pass rounds to NVFP4."""
BALANCE_WEIGHT = 0.02
Z_LOSS_WEIGHT = 1e-4
TOKENS_PER_STEP = 32768
RECORDED_QUESTIONS = 2000

Rounding = Callable[[Tensor], Tensor]


def demo_config() -> Qwen3MoeConfig:
    """5.8 M parameters, of which a token uses 1.6 M besides the embedding."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=256,  # of dense layers, of which there are none
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=24,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=MAX_LENGTH,
    )


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


def dense_experts(
    experts: Qwen3MoeExperts, rounding: Rounding, x: Tensor, topk_ids: Tensor, topk_weights: Tensor
) -> Tensor:
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


def install_training_forward(model: Qwen3MoeForCausalLM, rounding: Rounding) -> None:
    """Replaces the forward pass of what NVFP4 quantizes: attention projections and experts."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.forward = partial(rounded_linear, linear, rounding)
        layer.mlp.experts.forward = partial(dense_experts, layer.mlp.experts, rounding)


def balance_loss(router_logits: tuple[Tensor, ...], valid: Tensor, top_k: int) -> Tensor:
    """Mean over layers of E · sum_e(share of choices · mean probability) (arXiv:2101.03961, equation 4), 1 when
    even, plus the router z-loss (arXiv:2202.08906, equation 5). `router_logits` [T, E] each, `valid` [T]."""
    total = valid.new_zeros((), dtype=torch.float32)
    for logits in router_logits:
        logits = logits.float()[valid]
        probabilities = logits.softmax(dim=-1)
        chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(top_k).indices, 1.0 / top_k)
        balance = logits.shape[1] * (chosen.mean(dim=0) * probabilities.mean(dim=0)).sum()
        total = total + BALANCE_WEIGHT * balance + Z_LOSS_WEIGHT * logits.logsumexp(dim=-1).square().mean()
    return total / len(router_logits)


def logits_of(model: Qwen3MoeForCausalLM, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [B, L, V] and each layer's router logits [B · L, E] of `tokens` [B, L], padded on the right."""
    output = model.model(input_ids=tokens, use_cache=False, output_router_logits=True)
    return model.lm_head(output.last_hidden_state), output.router_logits


def training_loss(model: Qwen3MoeForCausalLM, bucket: Bucket) -> tuple[Tensor, Tensor]:
    """The loss to minimize, and its answer part alone, over a batch of rows."""
    inputs, targets = bucket.tokens[:, :-1], bucket.tokens[:, 1:]
    weights = bucket.loss_weights[:, 1:].flatten()
    logits, router_logits = logits_of(model, inputs)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    answers = (losses * weights).sum() / weights.sum()
    valid = (inputs != model.config.pad_token_id).flatten()
    return answers + balance_loss(router_logits, valid, model.config.num_experts_per_tok), answers.detach()


@torch.no_grad()
def share_answered(model: Qwen3MoeForCausalLM, buckets: Iterable[Bucket]) -> float:
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
    model: Qwen3MoeForCausalLM,
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
            loss, answer_loss = training_loss(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            with autocast():
                answered = share_answered(model, validation)
            print(
                f"step {step + 1}/{steps}  loss {answer_loss.item():.4f}  all {loss.item():.4f}  "
                f"validation {answered:.1%}  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def save_checkpoint(model: Qwen3MoeForCausalLM, directory: Path) -> None:
    """Writes the model in BF16 with the tokenizer and the tokens that end an answer."""
    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids([END_OF_MESSAGE, END_OF_TEXT]),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
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

    config = demo_config()
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = Qwen3MoeForCausalLM(config).to(device)
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
