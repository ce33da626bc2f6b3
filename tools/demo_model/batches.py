"""Training conversations as token rows of a few fixed lengths."""

import functools
import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .data import TRAINING_SEED, Conversation, heldout, training_conversations
from .tokenizer import END_OF_MESSAGE, MAX_LENGTH, START_OF_MESSAGE, build_tokenizer

ROW_LENGTHS = (64, 256, 1024, MAX_LENGTH)
SHARD = 10_000
"""Conversations that one process prepares at a time."""
PROMPT_WEIGHT = 0.05
"""What a token weighs in the loss when it is no part of an answer. Answers weigh 1, padding 0."""

Rows = tuple[NDArray[np.int16], NDArray[np.float32]]  # tokens and loss weights, [N, L] each


@dataclass(frozen=True)
class Bucket:
    """Rows of one length L, padded on the right."""

    tokens: torch.Tensor  # int64 [N, L]
    loss_weights: torch.Tensor  # fp32 [N, L]

    def to(self, device: torch.device) -> "Bucket":
        return Bucket(self.tokens.to(device), self.loss_weights.to(device))

    def select(self, rows: torch.Tensor) -> "Bucket":
        """The rows with the indices `rows`, int64 [M] on the same device."""
        return Bucket(self.tokens[rows], self.loss_weights[rows])


class Batches:
    """Endless random batches, each of one bucket's rows; buckets come up as often as they have tokens."""

    def __init__(self, buckets: dict[int, Bucket], tokens_per_batch: int) -> None:
        self.buckets = list(buckets.values())
        self.tokens_per_batch = tokens_per_batch
        self.shares = [bucket.tokens.numel() for bucket in self.buckets]
        self.rng = random.Random(TRAINING_SEED)
        self.generator = torch.Generator(self.buckets[0].tokens.device).manual_seed(TRAINING_SEED)

    def __iter__(self) -> Iterator[Bucket]:
        return self

    def __next__(self) -> Bucket:
        bucket = self.rng.choices(self.buckets, self.shares)[0]
        count, length = bucket.tokens.shape
        size = (max(1, self.tokens_per_batch // length),)
        device = bucket.tokens.device
        return bucket.select(torch.randint(count, size, generator=self.generator, device=device))


def encode(encode_text: Callable[[str], list[int]], conversation: Conversation) -> tuple[list[int], list[float]]:
    """Token ids as the chat template gives them and each one's weight in the loss.

    An answer's weight is on its text and the end of message, so on all that the model has to generate.
    """
    tokens: list[int] = []
    weights: list[float] = []
    for message in conversation.messages:
        answers = message["role"] == "assistant"
        pieces = (
            (f"{START_OF_MESSAGE}{message['role']}\n", PROMPT_WEIGHT),
            (f"{message['content']}{END_OF_MESSAGE}", 1.0 if answers else PROMPT_WEIGHT),
            ("\n", PROMPT_WEIGHT),
        )
        for text, weight in pieces:
            ids = encode_text(text)
            tokens += ids
            weights += [weight] * len(ids)
    return tokens, weights


def _rows_by_length(conversations: Iterable[Conversation]) -> dict[int, Rows]:
    """Each conversation in the shortest row that holds it; what exceeds the longest row is cut off."""
    tokenizer = build_tokenizer()
    encode_text = functools.cache(tokenizer.encode)  # most pieces come up again and again
    encoded: dict[int, list[tuple[list[int], list[float]]]] = {length: [] for length in ROW_LENGTHS}
    for conversation in conversations:
        tokens, weights = encode(encode_text, conversation)
        tokens, weights = tokens[:MAX_LENGTH], weights[:MAX_LENGTH]
        encoded[next(length for length in ROW_LENGTHS if length >= len(tokens))].append((tokens, weights))
    rows = {}
    for length, members in encoded.items():
        all_tokens = np.full((len(members), length), tokenizer.pad_token_id, np.int16)
        all_weights = np.zeros((len(members), length), np.float32)
        for row, (tokens, weights) in enumerate(members):
            all_tokens[row, : len(tokens)] = tokens
            all_weights[row, : len(tokens)] = weights
        rows[length] = (all_tokens, all_weights)
    return rows


def _buckets(shards: list[dict[int, Rows]]) -> dict[int, Bucket]:
    """Row length -> all rows of that length, lengths without rows left out."""
    buckets = {}
    for length in ROW_LENGTHS:
        tokens = np.concatenate([shard[length][0] for shard in shards])
        weights = np.concatenate([shard[length][1] for shard in shards])
        if len(tokens):
            buckets[length] = Bucket(torch.from_numpy(tokens).long(), torch.from_numpy(weights))
    return buckets


def _training_shard(shard: int) -> dict[int, Rows]:
    return _rows_by_length(itertools.islice(training_conversations(f"{TRAINING_SEED}/{shard}"), SHARD))


def training_buckets(conversations: int, workers: int) -> dict[int, Bucket]:
    """Rows of the first `conversations` (rounded up to whole shards), whatever `workers` is."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return _buckets(pool.map(_training_shard, range(-(-conversations // SHARD)), chunksize=1))


def held_out_buckets(count: int, seed: int | str) -> dict[int, Bucket]:
    """Rows of the held-out conversations of `seed`."""
    return _buckets([_rows_by_length(heldout(count, seed))])
