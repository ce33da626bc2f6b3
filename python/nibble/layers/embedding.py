"""Token embedding and the output projection to the vocabulary, both split over ranks by tokens of the vocabulary."""

import torch
import torch.nn.functional as F

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import Communicator
from nibble.distributed.parallel_state import ParallelState
from nibble.layers.dp_attention import dp_gather_logit_rows, dp_own_logit_rows
from nibble.layers.partial_sum import Summand, partial_sum
from nibble.layers.weights import Shard, WeightTarget, float_target
from nibble.utils.dtypes import torch_dtype


class VocabShard:
    """A rank's rows of a `[vocab, H]` matrix: as many on each rank of `group`, the last filled up with zeros."""

    def __init__(self, config: EngineConfig, group: Communicator) -> None:
        self.group, self.vocab_size = group, config.model.vocab_size
        rows = -(-self.vocab_size // group.world_size)
        start = min(group.rank * rows, self.vocab_size)
        self.tokens = Shard(self.vocab_size, start, min(rows, self.vocab_size - start))
        self.weight = torch.zeros(rows, config.model.hidden_size, dtype=torch_dtype(config.dtype))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, H]`, the same on all ranks, to `[R, vocab]`. Collective."""
        logits = F.linear(hidden, self.weight)  # [R, vocab / W]
        if self.group.world_size == 1:
            return logits
        parts = self.group.all_gather(logits).view(self.group.world_size, *logits.shape)
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size].contiguous()

    def weight_target(self) -> WeightTarget:
        return float_target(self.weight[: self.tokens.size], shards=[self.tokens])


class VocabEmbedding:
    """`ids [T] -> [T, H]`: of tokens that other ranks of the attention group have, zeros."""

    def __init__(self, config: EngineConfig, parallel: ParallelState) -> None:
        self.shard = VocabShard(config, parallel.attn_tp_group)

    def __call__(self, ids: torch.Tensor) -> Summand:
        tokens, group = self.shard.tokens, self.shard.group
        if group.world_size == 1:
            return F.embedding(ids, self.shard.weight)
        local = ids - tokens.start
        elsewhere = (local < 0) | (local >= tokens.size)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.shard.weight)
        return partial_sum(rows.masked_fill_(elsewhere[:, None], 0), group)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": self.shard.weight_target()}


class LMHead:
    """`[R, H] -> [R, vocab]`, over the ranks of the attention group, or over all ranks for the rows of all groups."""

    def __init__(self, config: EngineConfig, parallel: ParallelState) -> None:
        self.over_all_ranks = not config.parallel.dp_lm_head
        self.shard = VocabShard(config, parallel.tp_group if self.over_all_ranks else parallel.attn_tp_group)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.over_all_ranks:
            return dp_own_logit_rows(self.shard.logits(dp_gather_logit_rows(hidden)))
        return self.shard.logits(hidden)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget]:
        return {f"{prefix}.weight": self.shard.weight_target()}


class TiedLMHead:
    """`[R, H] -> [R, vocab]` with the matrix of the embedding; a copy in the checkpoint is not read."""

    def __init__(self, embedding: VocabEmbedding) -> None:
        self.shard = embedding.shard

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.shard.logits(hidden)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]:
        return {f"{prefix}.weight": None}
