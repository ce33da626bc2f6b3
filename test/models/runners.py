"""Model runners on small checkpoints, without the rest of the engine."""

from pathlib import Path

import torch

from nibble.config.resolve import EngineConfig, resolve
from nibble.config.server_args import ServerArgs
from nibble.distributed.communicator import Communicator, SingleRankCommunicator
from nibble.distributed.parallel_state import ParallelState
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner


def engine_config(folder: Path, **args: object) -> EngineConfig:
    defaults = {"model_path": str(folder), "device": "cpu", "page_size": 4, "max_total_tokens": 1024}
    return resolve(ServerArgs(**{**defaults, **args}))


def data_parallel_state(group: Communicator, rank: int = 0) -> ParallelState:
    """With dp = ep = tp: every rank is an attention group and has whole experts."""
    alone = SingleRankCommunicator("attn_tp")
    return ParallelState(rank, group, alone, alone, group, group, ep_size=group.world_size)


def single_rank_runner(folder: Path, **args: object) -> ModelRunner:
    return ModelRunner(engine_config(folder, **args), data_parallel_state(SingleRankCommunicator("tp")))


def all_logits(
    runner: ModelRunner, prompts: list[list[int]], chunk: int = 10**6, global_num_tokens: list[int] | None = None
) -> list[torch.Tensor]:
    """Logits of every position of every prompt, all prompts in one batch, `chunk` tokens of each a step."""
    page_size = runner.config.args.page_size
    tables, first = [], 0
    for prompt in prompts:
        count = -(-len(prompt) // page_size)
        tables.append(list(range(first, first + count)))
        first += count
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    while any(position < len(prompt) for position, prompt in zip(done, prompts, strict=True)):
        lengths = [min(chunk, len(prompt) - position) for position, prompt in zip(done, prompts, strict=True)]
        members = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i] > 1)
        batch = ForwardBatch(
            input_ids=[t for i in members for t in prompts[i][done[i] : done[i] + lengths[i]]],
            positions=[p for i in members for p in range(done[i], done[i] + lengths[i])],
            attention=AttentionBatch(
                [lengths[i] for i in members], [done[i] + lengths[i] for i in members], [tables[i] for i in members]
            ),
            logit_rows=list(range(sum(lengths))),
        )
        rows = runner.forward(batch, global_num_tokens or [sum(lengths)]).split([lengths[i] for i in members])
        for index, part in zip(members, rows, strict=True):
            logits[index].append(part)
            done[index] += len(part)
    return [torch.cat(parts) for parts in logits]
