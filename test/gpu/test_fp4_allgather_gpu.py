"""A model's ranks on a GPU: the FP4 gather changes no bit, and each backend brings the same rows."""

from collections.abc import Iterator

import pytest
import torch

import test_fp4_allgather as on_cpu
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]
checkpoint = on_cpu.checkpoint

SIZES = {**on_cpu.SIZES, 8: [[2] * 8, [3, 1, 6, 2, 9, 4, 1, 5], [0, 4, 1, 0, 2, 0, 3, 1]]}


@pytest.fixture(scope="module", params=[1, 2, 4, 8])
def ranks(request, tmp_path_factory) -> Iterator[RankProcesses]:
    with gpu_ranks(request.param, tmp_path_factory, timeout_s=170) as processes:
        yield processes


def forward(ranks, checkpoint, sizes, fp4, moe_comm, combine="bf16"):
    arguments = {"folder": str(checkpoint), "sizes": sizes, "backend": "shared_memory", "device": "cuda"}
    arguments["combine"] = combine
    return ranks.run(on_cpu.forward, fp4=fp4, moe_comm=moe_comm if ranks.world_size > 1 else "auto", **arguments)


@pytest.mark.parametrize("moe_comm", ["nccl", "peer"])
def test_fp4_gather_on_and_off_give_the_same_bits(ranks, checkpoint, moe_comm):
    if ranks.world_size == 1 and moe_comm == "peer":
        pytest.skip("one rank has no peers")
    for sizes in SIZES[ranks.world_size]:
        on, off = (forward(ranks, checkpoint, sizes, fp4, moe_comm) for fp4 in (True, False))
        assert [result["bits"] for result in on] == [result["bits"] for result in off], sizes
        for result, size in zip(on, sizes, strict=True):
            assert len(result["logits"]) == size
            assert torch.tensor(result["logits"]).isfinite().all()


def test_peer_memory_and_nccl_differ_by_the_rounding_of_sums_only(ranks, checkpoint):
    """NCCL may round to bf16 after each term, peer memory rounds once."""
    if ranks.world_size == 1:
        pytest.skip("one rank has no peers")
    for sizes in SIZES[ranks.world_size]:
        through_nccl, through_peers = (forward(ranks, checkpoint, sizes, True, backend) for backend in ("nccl", "peer"))
        for a, b in zip(through_nccl, through_peers, strict=True):
            torch.testing.assert_close(torch.tensor(a["logits"]), torch.tensor(b["logits"]), rtol=0.05, atol=0.05)


def test_results_in_fp8_give_the_same_bits_on_both_backends_and_with_fp4_on_and_off(ranks, checkpoint):
    """FP8 rows are summed in rank order, whatever brings them.

    Beside results in BF16, a rounding may change an FP4 code or the choice of an expert, and with it all behind.
    """
    if ranks.world_size != 4:
        pytest.skip("one size is enough")
    for sizes in SIZES[ranks.world_size]:
        through_nccl = forward(ranks, checkpoint, sizes, True, "nccl", "fp8")
        through_peers, off = (forward(ranks, checkpoint, sizes, fp4, "peer", "fp8") for fp4 in (True, False))
        assert [r["bits"] for r in through_nccl] == [r["bits"] for r in through_peers] == [r["bits"] for r in off], (
            sizes
        )
        ours, expected = (
            torch.cat([torch.tensor(result["logits"]) for result in results if result["logits"]])
            for results in (through_peers, forward(ranks, checkpoint, sizes, True, "peer"))
        )
        assert ours.shape == expected.shape and (ours - expected).norm() <= 0.2 * expected.norm(), sizes
