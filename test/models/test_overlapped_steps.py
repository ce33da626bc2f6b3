"""A real model gives the same tokens and log-probabilities whether or not the host knows them a step later."""

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import save_qwen3_moe
from nibble.distributed.communicator import SingleRankCommunicator
from nibble.ipc.messages import NewRequest, TokenBatch, ToRank
from nibble.model_executor.model_runner import ModelRunner
from nibble.model_executor.sampler import Sampler
from nibble.model_executor.step_executor import StepExecutor
from nibble.sampling_params import SamplingParams
from nibble.scheduler.dp_sync import DpSync
from nibble.scheduler.event_loop import EventLoop
from nibble.scheduler.scheduler import Scheduler, SchedulerLimits
from nibble.structured_output.store import GrammarStore
from runners import data_parallel_state, engine_config

EOS = 5
SAMPLING = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 2.0, "top_p": 0.95},
    "penalized": {"temperature": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
    "no early stop": {"temperature": 1.0, "min_new_tokens": 12},
}


class Asleep(Exception):
    """The loop waits for a message, and no more will come."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    save_qwen3_moe(folder)
    return folder


@pytest.fixture(scope="module")
def expected(checkpoint) -> dict[str, tuple]:
    return run(checkpoint, overlaps=False)


def run(folder: Path, overlaps: bool, num_pages: int = 256, chunk: int = 64, max_running: int = 6) -> dict[str, tuple]:
    group = SingleRankCommunicator("dp")
    config = replace(engine_config(folder, max_running_requests=max_running), overlap_schedule=overlaps)
    runner = ModelRunner(config, data_parallel_state(group))
    scheduler = Scheduler(SchedulerLimits(4, chunk, max_running, 128, frozenset({EOS})), num_pages)
    executor = StepExecutor(runner, Sampler([EOS]))
    told: dict[str, tuple] = {}  # tokens and log-probabilities of each request

    def note(batch: TokenBatch) -> None:
        for update in batch.updates:
            ids, logprobs = told.setdefault(update.request_id, ([], []))
            ids += update.token_ids
            logprobs += update.logprobs

    inbox: list[list[ToRank]] = [[request] for request in requests()]

    class Inbox:
        def receive(self, wait: bool) -> list[ToRank]:
            if not inbox and wait:
                raise Asleep
            return inbox.pop(0) if inbox else []

    grammars = GrammarStore(Path("unused"), lambda key, error: None)
    with pytest.raises(Asleep):
        EventLoop(0, scheduler, executor, DpSync(group), Inbox(), note, grammars, overlaps=overlaps).run_forever()
    scheduler.check_idle()
    assert scheduler.num_retracted > 0 or num_pages > 100
    return told


def requests() -> list[NewRequest]:
    """A new one each step, of each kind with and without log-probabilities."""
    kinds = [(name, logprobs) for name in SAMPLING for logprobs in (False, True)]
    return [
        NewRequest(
            number + 1,
            f"{name} {logprobs}",
            [7 * number % 128, *range(20, 26 + 3 * number)],
            SamplingParams(max_new_tokens=16, **SAMPLING[name]),
            seed=number,
            return_logprob=logprobs,
            top_logprobs_num=2,
            update_interval=1,
            priority=0,
        )
        for number, (name, logprobs) in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    "limits", [{}, {"chunk": 5}, {"num_pages": 32, "max_running": 8}], ids=["as it comes", "in chunks", "retracted"]
)
def test_overlap_changes_no_token_and_no_logprob(checkpoint, expected, limits):
    got = run(checkpoint, overlaps=True, **limits)
    assert {name: ids for name, (ids, _) in got.items()} == {name: ids for name, (ids, _) in expected.items()}
    for name, (ids, logprobs) in got.items():
        assert len(logprobs) == (len(ids) if "True" in name else 0)
        for found, right in zip(logprobs, expected[name][1], strict=True):
            assert found.token_id == right.token_id
            assert found.logprob == pytest.approx(right.logprob, abs=1e-4)
            assert [token for _, token in found.top] == [token for _, token in right.top]
