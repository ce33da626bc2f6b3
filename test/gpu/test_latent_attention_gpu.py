"""The Triton kernel of latent attention, compiled, attends as PyTorch does."""

import pytest
import torch

import latent_attention_cases as cases

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


@pytest.mark.parametrize(("heads", "rank", "rope", "page_size"), [(128, 512, 64, 16), (16, 512, 64, 1), (3, 20, 12, 4)])
@pytest.mark.parametrize("seq_lens", [[1], [700], [1, 37, 300, 16]], ids=str)
def test_every_head_attends_to_the_tokens_of_its_sequence_and_no_others(
    seq_lens: list[int], heads: int, rank: int, rope: int, page_size: int
) -> None:
    cases.check_decode(seq_lens, heads, rank, rope, page_size, BF16, "cuda")


def test_a_captured_step_follows_its_plan() -> None:
    """The lengths, the pages and the slots of the capture must not stay behind in the graph."""
    ours, theirs = cases.backends(512, 64, 16, 60, BF16, "cuda")
    step = ours.graph_step(3, 80)
    inputs = cases.random_qkv(3, 16, 512, 64, BF16, "cuda")
    step.plan(cases.AttentionBatch([1] * 3, [1] * 3, [[ours.pool.padding_page]] * 3))
    step.forward(0, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step.forward(0, *inputs)
    for seed, seq_lens in enumerate([[1, 37, 300], [2, 38, 301], [289, 1, 16]]):
        batch = cases.batch_of(seq_lens, 16, 60, seed)
        for tensor, new in zip(inputs, cases.random_qkv(3, 16, 512, 64, BF16, "cuda", seed), strict=True):
            tensor.copy_(new)
        step.plan(batch)
        graph.replay()
        torch.testing.assert_close(out, theirs.plan(batch).forward(0, *inputs), rtol=2e-2, atol=2e-2)
        kept = slice(0, ours.pool.num_pages)
        assert torch.equal(ours.pool.keys[0][kept], theirs.pool.keys[0][kept])
