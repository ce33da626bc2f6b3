"""Decoding with latent attention (MLA): every head of a token attends to the same latent rows of its sequence.

No program waits for another, so launches of ranks that share a GPU run side by side, however many they are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nibble.kernels.triton.nvfp4_tiles import num_multiprocessors

_HEADS_TILE = 16  # the fewest rows of a product on tensor cores
_TOKENS_TILE = 32
_MAX_SPLITS = 16
_PROGRAMS_PER_MULTIPROCESSOR = 2


def latent_decode(
    q: Tensor, cache: Tensor, first_pages: Tensor, pages: Tensor, seq_lens: Tensor, kv_lora_rank: int, scale: float
) -> Tensor:
    """For one query of each of T sequences: [T, N * R], R = `kv_lora_rank`, in the dtype of q.

    Args:
        q: [T, N, R + P], neighbours in memory, as the cache: [pages, page_size, 1, R + P] of q's dtype.
        first_pages: int32 [T] or more: where the pages of each sequence begin in `pages`, int32.
        seq_lens: int32 [T], at least 1: so many tokens of its pages each sequence attends to.
        scale: what products of queries and keys are multiplied by.

    A sequence is split over several programs, flash decoding's way; how many depends on T, N and the device only, so a
    CUDA graph can capture it.
    """
    rows, heads, size = q.shape
    out = torch.empty(rows, heads * kv_lora_rank, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    head_tiles = triton.cdiv(heads, _HEADS_TILE)
    wanted = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(q.device), rows * head_tiles)
    splits = min(_MAX_SPLITS, triton.next_power_of_2(wanted))
    partial = torch.empty(rows, heads, splits, kv_lora_rank, dtype=torch.float32, device=q.device)
    log_sums = torch.empty(rows, heads, splits, dtype=torch.float32, device=q.device)
    rank_tile = max(16, triton.next_power_of_2(kv_lora_rank))
    rope = size - kv_lora_rank
    _attend_kernel[(rows, head_tiles, splits)](
        q,
        cache,
        first_pages,
        pages,
        seq_lens,
        partial,
        log_sums,
        scale * math.log2(math.e),
        HEADS=heads,
        RANK=kv_lora_rank,
        RANK_TILE=rank_tile,
        ROPE=rope,
        ROPE_TILE=max(16, triton.next_power_of_2(rope)),
        PAGE_SIZE=cache.shape[1],
        SPLITS=splits,
        HEADS_TILE=_HEADS_TILE,
        TOKENS_TILE=_TOKENS_TILE,
        num_warps=4,
        num_stages=2,
    )
    _merge_kernel[(rows * heads,)](
        partial, log_sums, out, RANK=kv_lora_rank, RANK_TILE=rank_tile, SPLITS=splits, num_warps=4
    )
    return out


@triton.jit
def _attend_kernel(
    q_ptr,
    cache_ptr,
    first_pages_ptr,
    pages_ptr,
    seq_lens_ptr,
    partial_ptr,
    log_sums_ptr,
    scale,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_TILE: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_TILE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    HEADS_TILE: tl.constexpr,
    TOKENS_TILE: tl.constexpr,
):
    """A split of a sequence, for a tile of heads: the softmax-weighted mean of its latent rows, and log2 of the sum of
    the weights, -inf for a split without tokens. `scale` is for powers of two.
    """
    SIZE: tl.constexpr = RANK + ROPE
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    head = tl.program_id(1) * HEADS_TILE + tl.arange(0, HEADS_TILE)
    is_head = head < HEADS
    element = tl.arange(0, RANK_TILE)
    is_element = element < RANK
    rope = tl.arange(0, ROPE_TILE)
    is_rope = rope < ROPE
    q_row_ptr = q_ptr + (row * HEADS + head[:, None]) * SIZE
    q_latent = tl.load(q_row_ptr + element[None, :], mask=is_head[:, None] & is_element[None, :], other=0.0)
    q_rope = tl.load(q_row_ptr + RANK + rope[None, :], mask=is_head[:, None] & is_rope[None, :], other=0.0)
    length = tl.load(seq_lens_ptr + row)
    table_ptr = pages_ptr + tl.load(first_pages_ptr + row)
    tokens_each = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS_TILE) * TOKENS_TILE
    begin = split * tokens_each
    end = tl.minimum(begin + tokens_each, length)
    largest = tl.full([HEADS_TILE], float("-inf"), tl.float32)
    total = tl.zeros([HEADS_TILE], tl.float32)
    mean = tl.zeros([HEADS_TILE, RANK_TILE], tl.float32)
    for start in range(begin, end, TOKENS_TILE):
        token = start + tl.arange(0, TOKENS_TILE)
        is_token = token < end
        page = tl.load(table_ptr + token // PAGE_SIZE, mask=is_token, other=0).to(tl.int64)
        token_ptr = cache_ptr + (page * PAGE_SIZE + token % PAGE_SIZE)[:, None] * SIZE
        latent = tl.load(token_ptr + element[None, :], mask=is_token[:, None] & is_element[None, :], other=0.0)
        k_rope = tl.load(token_ptr + RANK + rope[None, :], mask=is_token[:, None] & is_rope[None, :], other=0.0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(k_rope), scores, input_precision="ieee")
        scores = tl.where(is_token[None, :], scores * scale, float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - now_largest[:, None])
        shrink = tl.exp2(largest - now_largest)
        total = total * shrink + tl.sum(weights, axis=1)
        mean = tl.dot(weights.to(latent.dtype), latent, mean * shrink[:, None], input_precision="ieee")
        largest = now_largest
    is_empty = total == 0
    mean = mean / tl.where(is_empty, 1.0, total)[:, None]
    log_sum = tl.where(is_empty, float("-inf"), largest + tl.log2(tl.where(is_empty, 1.0, total)))
    at = (row * HEADS + head) * SPLITS + split
    tl.store(partial_ptr + at[:, None] * RANK + element[None, :], mean, mask=is_head[:, None] & is_element[None, :])
    tl.store(log_sums_ptr + at, log_sum, mask=is_head)


@triton.jit
def _merge_kernel(
    partial_ptr, log_sums_ptr, out_ptr, RANK: tl.constexpr, RANK_TILE: tl.constexpr, SPLITS: tl.constexpr
):
    """The splits of one head of one row, weighted by their sums."""
    at = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    element = tl.arange(0, RANK_TILE)
    is_element = element < RANK
    log_sums = tl.load(log_sums_ptr + at * SPLITS + split)
    weights = tl.exp2(log_sums - tl.max(log_sums, axis=0))
    means = tl.load(
        partial_ptr + (at * SPLITS + split)[:, None] * RANK + element[None, :], mask=is_element[None, :], other=0.0
    )
    merged = tl.sum(means * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out_ptr + at * RANK + element, merged.to(out_ptr.dtype.element_ty), mask=is_element)
