"""Zero rows: a rank without work takes part in a step, a prompt's first chunks want no logits, and nothing breaks."""

import ctypes
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import COMMON
from nibble.distributed.communicator import Communicator, SingleRankCommunicator
from nibble.kernels.cpu.library import c_kernels
from nibble.kernels.torch.wire_row import quantize_pack
from nibble.layers.attention.backend import AttentionBatch
from nibble.model_executor.forward_batch import ForwardBatch
from nibble.model_executor.model_runner import ModelRunner
from runners import data_parallel_state, engine_config

HIDDEN, EXPERTS, TOP_K, PEER_ROWS = 64, 12, 3, 5
ON_C_KERNELS = pytest.mark.parametrize("runner", ["c"], indirect=True)


class BesideABusyPeer(SingleRankCommunicator):
    """Rank 0 of two; the peer always has rows."""

    def __init__(self) -> None:
        Communicator.__init__(self, rank=0, world_size=2, name="dp")
        ids = torch.arange(PEER_ROWS * TOP_K, dtype=torch.int32).view(PEER_ROWS, TOP_K) % EXPERTS
        self.rows = quantize_pack(torch.ones(PEER_ROWS, HIDDEN), ids, torch.ones(PEER_ROWS, TOP_K), torch.tensor(0.01))

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        return [torch.cat([tensors[0], self.rows])]

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return x[: sizes[0]].clone()


@pytest.fixture(scope="module", params=["c", "torch"])
def runner(request, tmp_path_factory) -> ModelRunner:
    folder = tmp_path_factory.mktemp("checkpoint")
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": 32}
    config = {**COMMON, **moe, "hidden_size": HIDDEN, "rms_norm_eps": 1e-6, "architectures": ["Qwen3MoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    ranks = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True, "enable_dp_lm_head": True}
    flags = {"load_format": "dummy", "enable_flashinfer_cutlass_moe": True, "cpu_kernels": request.param}
    return ModelRunner(engine_config(folder, **ranks, **flags), data_parallel_state(BesideABusyPeer()))


def prefill(logit_rows: Sequence[int]) -> ForwardBatch:
    """Four tokens of one prompt."""
    return ForwardBatch([1, 2, 3, 4], [0, 1, 2, 3], AttentionBatch([4], [4], [[0]]), list(logit_rows))


@contextmanager
def launches_on_nothing() -> Iterator[set[str]]:
    """The C kernels that get the address of an empty tensor, which is null."""
    library, names = c_kernels(), set()
    functions = {name: function for name, function in vars(library).items() if getattr(function, "argtypes", None)}

    def watched(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            kinds = zip(function.argtypes, arguments, strict=True)
            if any(kind is ctypes.c_void_p and not value for kind, value in kinds):
                names.add(name)
            return function(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            patch.setattr(library, name, watched(name, function))
        yield names


@pytest.mark.parametrize("logit_rows", [[], [3], [0, 1, 2, 3]])
def test_there_are_as_many_logits_as_are_wanted_though_that_be_none(runner, logit_rows):
    assert runner.forward(prefill(logit_rows), [4, PEER_ROWS]).shape == (len(logit_rows), COMMON["vocab_size"])


def test_an_idle_rank_has_no_logits(runner):
    assert runner.forward(None, [0, PEER_ROWS]).shape == (0, COMMON["vocab_size"])


@ON_C_KERNELS
def test_a_rank_with_rows_launches_no_kernel_on_zero_rows(runner):
    with launches_on_nothing() as names:
        runner.forward(prefill([3]), [4, PEER_ROWS])
    assert names == set()


@ON_C_KERNELS
def test_an_idle_rank_launches_no_kernel_on_zero_rows(runner):
    with launches_on_nothing() as names:
        runner.forward(None, [0, PEER_ROWS])
    assert names == set()


@ON_C_KERNELS
def test_no_kernel_computes_the_logits_of_zero_rows(runner):
    with launches_on_nothing() as names:
        runner.forward(prefill([]), [4, PEER_ROWS])
    assert names == set()
