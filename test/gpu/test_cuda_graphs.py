"""Decoding steps as CUDA graphs compute what their kernels compute, whatever each rank has to do."""

from collections.abc import Iterator

import pytest

import graph_ranks as on_rank
import nibble
from gpu_ranks import gpu_ranks
from rank_processes import RankProcesses, free_port

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]


@pytest.fixture(scope="module", params=[1, 2, 4, 8], ids="{}-ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankProcesses]:
    with gpu_ranks(request.param, tmp_path_factory, timeout_s=170) as processes:
        yield processes


@pytest.mark.parametrize("combine", ["bf16", "fp8"])
@pytest.mark.parametrize("moe_comm", ["nccl", "peer"])
def test_a_replay_is_bit_equal_to_its_kernels_even_uneven_and_with_idle_ranks(
    ranks: RankProcesses, moe_comm: str, combine: str
) -> None:
    """Ranks that choose a graph each by their own rows read memory of no one: all take that of the fullest rank."""
    world_size = ranks.world_size
    if combine == "fp8" and world_size != 2:
        pytest.skip("one size is enough")
    if world_size == 1:
        if moe_comm == "peer":
            pytest.skip("one rank has no peers")
        moe_comm = "auto"
    uneven = [[(5 * rank + step) % 8 + 1 for rank in range(world_size)] for step in range(3)]
    one_idle = [[0 if rank == idle else 3 for rank in range(world_size)] for idle in range(min(world_size, 3))]
    only_last = [[0] * (world_size - 1) + [2]]
    sizes = [[1] * world_size, [8] * world_size, *uneven, *(one_idle if world_size > 1 else []), *only_last]
    ranks.run(on_rank.check_replays, sizes=sizes, moe_comm=moe_comm, combine=combine)


@pytest.mark.parametrize("combine", ["bf16", "fp8"])
def test_replays_with_peer_memory_inside_two_hosts_are_bit_equal_to_their_kernels(
    ranks: RankProcesses, combine: str
) -> None:
    if ranks.world_size != 4:
        pytest.skip("one size is enough")
    hosts = {"nnodes": 2, "dist_init_addr": f"127.0.0.1:{free_port() - 1}"}
    sizes = [[1] * 4, [8] * 4, [6, 3, 8, 5], [0, 3, 0, 3], [0, 0, 3, 1], [0, 0, 0, 2]]
    ranks.run(on_rank.check_replays, sizes=sizes, moe_comm="peer", combine=combine, hosts=hosts)


def test_greedy_text_is_the_same_with_and_without_graphs() -> None:
    """One request at a time: the rows of a step, and so the order of sums, are the same."""
    questions = [
        "What is 17 plus 25?",
        "Tom has 12 apples and buys 30 more. How many does he have?",
        "What is 9 minus 4?",
    ]
    texts = []
    for disable_cuda_graph in (False, True):
        with nibble.Engine(
            model_path=str(on_rank.DEMO_MODEL),
            device="cuda",
            disable_cuda_graph=disable_cuda_graph,
            cuda_graph_max_bs=2,
            log_level="warning",
        ) as engine:
            assert (engine.config.cuda_graph_rows == ()) == disable_cuda_graph
            prompts = [
                engine.tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions
            ]
            sampling = {"temperature": 0, "max_new_tokens": 48, "ignore_eos": True}
            texts.append(
                [engine.generate(input_ids=prompt, sampling_params=sampling)["output_ids"] for prompt in prompts]
            )
    assert texts[0] == texts[1]
