"""Token embedding and the output projection to the vocabulary."""

import torch
import torch.nn.functional as F

from nibble.layers.weights import WeightTarget, float_target


class VocabEmbedding:
    """`ids [T] -> [T, H]`."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": float_target(self.weight)}


class LMHead:
    """`[T, H] -> [T, vocab]`."""

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": float_target(self.weight)}


class TiedLMHead:
    """`[T, H] -> [T, vocab]` with the matrix of the embedding; a copy in the checkpoint is not read."""

    def __init__(self, embedding: VocabEmbedding) -> None:
        self.embedding = embedding

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.embedding.weight)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]:
        return {f"{prefix}.weight": None}
