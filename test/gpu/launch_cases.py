"""Steps of each kind, launched while the GPU sleeps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch

from nibble.distributed.parallel_state import initialize_parallel
from nibble.kernels.select import select_kernels
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch, ScoredToken
from nibble.model_executor.future_tokens import future_token
from nibble.model_executor.logprobs import LogprobsWanted
from nibble.model_executor.model_runner import ModelRunner
from nibble.model_executor.sampler import Sampler, SamplingRow
from nibble.model_executor.step_executor import LaunchedStep, StepExecutor
from nibble.sampling_params import SamplingParams
from runners import engine_config

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
PROMPTS = [list(range(3, 23)), list(range(40, 47)), [50]]
GREEDY: list[dict[str, Any]] = [{"temperature": 0.0}] * 3
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0, "min_new_tokens": 9, "logit_bias": {5: -2.0}},
]
WANTED = LogprobsWanted(top=2, named=(7,))
PAGES_EACH = 16
STEPS = [(0, False), (1, True), (2, False), (3, True)]
"""How many tokens there are behind the prompts, and whether a CUDA graph may decode the next ones."""
SLEEP_CYCLES = 2_000_000_000  # a second or so, much longer than a launch


def make_demo_runner(folder: Path) -> ModelRunner:
    config = engine_config(DEMO_MODEL, device="cuda", cuda_graph_max_bs=4, log_level="error")
    return ModelRunner(config, initialize_parallel(config, 0, folder))


def assert_no_launch_waits_for_what_the_gpu_has_still_to_do(runner: ModelRunner) -> None:
    """Prompts, decoding with and without a CUDA graph, log-probabilities: everything that overlaps.

    FlashInfer copies the pages of a graph without the host only where they are on the device already.
    """
    config = runner.config
    sampler = Sampler([2], select_kernels(config.kernels, config.moe_kernel).argmax)
    executor = StepExecutor(runner, sampler)
    for sampling, wanted in ((GREEDY, None), (MIXED, WANTED)):
        expected = _tokens([_launch(executor, _rows(sampling, wanted, step[0]), *step) for step in STEPS])  # compiles
        torch.cuda.synchronize()
        launched = []
        for step in STEPS:
            with _gpu_asleep() as is_asleep:
                launched.append(_launch(executor, _rows(sampling, wanted, step[0]), *step))
                assert is_asleep(), f"the launch of step {step} waits for the GPU"
        assert _tokens(launched) == expected


@contextmanager
def _gpu_asleep() -> Iterator[Callable[[], bool]]:
    """PyTorch's own waits raise an error, which says where; others are seen by the GPU's being awake."""
    awake = torch.cuda.Event()
    torch.cuda._sleep(SLEEP_CYCLES)
    awake.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield lambda: not awake.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _tokens(launched: list[LaunchedStep]) -> list[list[int | None]]:
    return [[token.token_id for token in step.wait()] for step in launched]


def _rows(sampling: list[dict[str, Any]], wanted: LogprobsWanted | None, generated: int) -> list[SamplingRow]:
    return [
        SamplingRow(SamplingParams(**kind), seed, [*prompt, *[0] * generated], len(prompt), wanted)
        for seed, (prompt, kind) in enumerate(zip(PROMPTS, sampling, strict=True))
    ]


def _launch(executor: StepExecutor, rows: list[SamplingRow], generated: int, decodes_only: bool) -> LaunchedStep:
    counts = [1] * len(PROMPTS) if generated else [len(prompt) for prompt in PROMPTS]
    ends = [len(prompt) + generated for prompt in PROMPTS]
    slots = list(range(len(PROMPTS)))
    last_rows = [end - 1 for end in accumulate(counts)]
    scored = [] if generated else [ScoredToken(0, PROMPTS[0][1], WANTED)]
    batch = ForwardBatch(
        input_ids=[future_token(slot) for slot in slots] if generated else list(chain(*PROMPTS)),
        positions=[position for end, count in zip(ends, counts, strict=True) for position in range(end - count, end)],
        attention=AttentionBatch(counts, ends, [range(slot * PAGES_EACH, (slot + 1) * PAGES_EACH) for slot in slots]),
        logit_rows=[0, *last_rows] if scored else last_rows,
        scored=scored,
    )
    return executor.launch(batch, rows, slots, [sum(counts)], decodes_only, [len(batch.logit_rows)])
