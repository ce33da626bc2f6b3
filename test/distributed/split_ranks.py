"""What the ranks of `test_splits.py` run: a small model under one split, prefill and then a decode step."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from nibble.distributed.communicator import Communicator
from nibble.distributed.parallel_state import ParallelState, initialize_parallel
from nibble.layers import dp_attention
from nibble.layers.attention.backend import AttentionBatch
from nibble.layers.dp_attention import DpPaddingMode
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner
from rank_processes import Rank
from runners import engine_config

PAGE = 4


def prompt(dp_rank: int, length: int) -> list[int]:
    return [(7 * dp_rank + 3 * position) % 120 + 1 for position in range(length)]


def run_cases(rank: Rank, folder: str, args: dict[str, Any], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case, `sizes` by attention group and a padding `mode` or none: logits, and the collectives entered."""
    torch.set_num_threads(1)
    runner = shared_runner(rank, folder, args)
    return [run_case(runner, **case) for case in cases]


def run_case(runner: ModelRunner, sizes: list[int], mode: str | None = None) -> dict[str, Any]:
    dp_rank = runner.config.parallel.dp_rank(runner.parallel.rank)
    forced: Any = nullcontext()
    if mode is not None:
        forced = mock.patch.object(dp_attention, "cheapest_padding_mode", return_value=DpPaddingMode(mode))
    with forced, recorded_collectives(runner.parallel) as collectives:
        prefill = step(runner, dp_rank, [(0, size) for size in sizes])
        decode = step(runner, dp_rank, [(size, min(size, 1)) for size in sizes])
    return {"logits": torch.cat([prefill, decode]).tolist(), "collectives": collectives}


def step(runner: ModelRunner, dp_rank: int, groups: list[tuple[int, int]]) -> torch.Tensor:
    """One forward pass; of each attention group the tokens that are computed already, and how many follow.

    Logits of every row but, where there are several, the first: fewer than rows, and differently many on each rank.
    """
    mine = dp_rank
    if not runner.config.parallel.groups_meet:
        groups, mine = [groups[dp_rank]], 0
    start, count = groups[mine]
    sizes = [count for _, count in groups]
    logit_sizes = [max(count - 1, min(count, 1)) for count in sizes]
    batch = None
    if count:
        attention = AttentionBatch([count], [start + count], [list(range(-(-(start + count) // PAGE)))])
        tokens = prompt(dp_rank, start + count)[start:]
        logit_rows = list(range(count - logit_sizes[mine], count))
        batch = ForwardBatch(tokens, list(range(start, start + count)), attention, logit_rows)
    if not any(sizes):  # the ranks would not step
        return torch.empty(0, runner.config.model.vocab_size, device=runner.device)
    return runner.forward(batch, sizes, global_num_logit_rows=logit_sizes)


def shared_runner(rank: Rank, folder: str, args: dict[str, Any]) -> ModelRunner:
    """The runner of all calls with these arguments."""
    name = f"{folder} {sorted(args.items())}"
    if name not in rank.state:
        config = engine_config(
            Path(folder), enable_dp_attention=True, page_size=PAGE, max_total_tokens=256, log_level="error", **args
        )
        node = config.parallel.node_of(rank.rank)
        run_dir = rank.run_dir / f"runner{len(rank.state)}-of-node{node}"  # hosts share no files
        run_dir.mkdir(mode=0o700, exist_ok=True)
        rank.state[name] = ModelRunner(config, initialize_parallel(config, rank.rank, run_dir))
    runner: ModelRunner = rank.state[name]
    return runner


def groups_of(rank: Rank, folder: str, args: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """Of each group of a rank what carries its rows, and its ranks, as a collective finds them."""
    state = shared_runner(rank, folder, args).parallel
    groups = {"tp": state.tp_group, "attn_tp": state.attn_tp_group, "dp": state.dp_group, "cpu": state.cpu_group}
    return {
        name: (type(group).__name__, group.all_gather(torch.tensor([rank.rank])).tolist())
        for name, group in groups.items()
    }


@contextmanager
def recorded_collectives(parallel: ParallelState) -> Iterator[list[str]]:
    """Every collective in which something travels, as "collective in group"; of equal groups the first one's name."""
    entered: list[str] = []
    groups = {"tp": parallel.tp_group, "attn_tp": parallel.attn_tp_group, "dp": parallel.dp_group}
    names = {id(group): name for name, group in reversed(groups.items())}

    def recording(group: Communicator) -> Any:
        run = group._run

        def record(collective: str, *arguments: Any) -> Any:
            entered.append(f"{collective} in {names[id(group)]}")
            return run(collective, *arguments)

        return record

    with ExitStack() as patches:
        for group in {id(group): group for group in groups.values() if group.world_size > 1}.values():
            patches.enter_context(mock.patch.object(group, "_run", recording(group)))
        yield entered
