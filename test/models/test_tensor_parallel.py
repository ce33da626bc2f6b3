"""Layers split over ranks: what the ranks compute, put together, is what one rank computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import quantize_to_nvfp4, save_qwen3, save_qwen3_moe
from nibble.distributed.communicator import SingleRankCommunicator
from nibble.kernels.torch.topk import topk_softmax
from nibble.layers.linear import RowParallelLinear, make_linear, split_heads, split_width
from nibble.layers.moe.fused_moe import FusedMoE
from nibble.layers.moe.token_dispatcher import GatheredRows
from nibble.layers.partial_sum import PartialSum, complete, partial_sum
from nibble.layers.weights import Shard
from nibble.model_executor.model_runner import ModelRunner
from nibble.models.qwen3_moe import Qwen3MoeForCausalLM
from nibble.utils.errors import ConfigError
from runners import data_parallel_state, engine_config


class OneOf(SingleRankCommunicator):
    """A rank of a group whose peers add what the test says."""

    def __init__(self, rank: int, world_size: int, peers: Tensor | float = 0.0) -> None:
        super().__init__("attn_tp")
        self.rank, self.world_size, self.peers, self.sums = rank, world_size, peers, 0

    def _all_reduce(self, x: Tensor) -> Tensor:
        self.sums += 1
        return x + self.peers


# Sums


def test_a_partial_sum_is_summed_once_however_often_it_is_completed():
    group = OneOf(0, 2, peers=1.0)
    total = complete(partial_sum(torch.ones(2, 3), group))
    assert torch.equal(total, torch.full((2, 3), 2.0))
    assert complete(total) is total and group.sums == 1


def test_what_a_group_of_one_computes_is_complete():
    x = torch.ones(2, 3)
    assert partial_sum(x, SingleRankCommunicator("attn_tp")) is x


def test_a_partial_sum_can_not_be_taken_for_its_sum():
    """Added to the residual as it is, it would lack the other ranks' terms without an error."""
    term = PartialSum(torch.ones(2, 3), OneOf(0, 2))
    with pytest.raises(TypeError):
        term + torch.ones(2, 3)  # type: ignore[operator]
    with pytest.raises(TypeError):
        torch.nn.functional.linear(term, torch.ones(3, 3))  # type: ignore[arg-type]


# Shares


@given(st.integers(1, 64), st.integers(1, 32), st.sampled_from([1, 2, 16]))
def test_shares_are_whole_units_of_everything_and_differ_by_one_at_most(units, ranks, unit):
    if units < ranks:
        with pytest.raises(ConfigError, match=f"{units * unit} values can't be split over {ranks} ranks"):
            Shard.split(units * unit, 0, ranks, unit)
        return
    shards = [Shard.split(units * unit, rank, ranks, unit) for rank in range(ranks)]
    assert [value for shard in shards for value in range(shard.start, shard.start + shard.size)] == list(
        range(units * unit)
    )
    sizes = {shard.size for shard in shards}
    assert all(size % unit == 0 for size in sizes) and max(sizes) - min(sizes) <= unit


@given(st.sampled_from([(h, kv, r) for kv in (1, 2, 4, 6) for h in (kv, 2 * kv, 4 * kv) for r in range(1, 25)
                        if h % r == 0 and (kv % r == 0 or r % kv == 0)]))  # fmt: skip
def test_every_query_head_finds_its_head_of_keys_and_values_on_its_rank(sizes):
    heads, kv_heads, ranks = sizes
    for rank in range(ranks):
        group = OneOf(rank, ranks)
        q, kv = split_heads(heads, 1, group), split_heads(kv_heads, 1, group)
        for local in range(q.size):
            assert (q.start + local) * kv_heads // heads == kv.start + local * kv.size // q.size


# Linear layers


@pytest.fixture(scope="module", params=["plain", "nvfp4"])
def folder(request, tmp_path_factory) -> Path:
    """A dense model whose biases are not small."""
    folder = tmp_path_factory.mktemp(request.param)
    save_qwen3(folder, attention_bias=True, num_hidden_layers=1)
    return quantize_to_nvfp4(folder) if request.param == "nvfp4" else folder


PREFIX = "model.layers.0.self_attn"


def filled(folder: Path, layer: object, prefix: str = PREFIX) -> object:
    """The layer with its part of the checkpoint's tensors."""
    tensors = load_file(folder / "model.safetensors")
    for name, target in layer.weight_targets(prefix).items():  # type: ignore[attr-defined]
        if target is not None:
            assert tuple(tensors[name].shape) == target.shape
            target.load(tensors[name])
    layer.process_weights_after_loading()  # type: ignore[attr-defined]
    return layer


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_split_over_ranks_lie_beside_each_other(folder, ranks):
    config = engine_config(folder)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    names = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    whole = filled(folder, make_linear(config, PREFIX, 64, list(names.items()), bias=True))(x).split(
        [*names.values()], 1
    )
    for rank in range(ranks):
        shards = {name: Shard.split(size, rank, ranks) for name, size in names.items()}
        ours = filled(folder, make_linear(config, PREFIX, 64, list(shards.items()), bias=True))(x)
        expected = [
            part.narrow(1, shards[name].start, shards[name].size) for name, part in zip(names, whole, strict=True)
        ]
        torch.testing.assert_close(ours, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_terms_of_inputs_split_over_ranks_add_up_with_the_bias_once(folder, ranks):
    """Added on every rank, a bias would count as often as there are ranks."""
    config = engine_config(folder)
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    whole = filled(folder, make_linear(config, PREFIX, 128, [("o_proj", 64)], bias=True))(x)
    total = torch.zeros(7, 64)
    for rank in range(ranks):
        columns = Shard.split(128, rank, ranks, 16)
        layer = filled(
            folder, RowParallelLinear(config, OneOf(rank, ranks), PREFIX, columns, ("o_proj", 64), bias=True)
        )
        term = layer(x[:, columns.start : columns.start + columns.size].contiguous())
        assert isinstance(term, PartialSum)
        total += term.term
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)


def test_a_width_is_cut_between_blocks_of_a_quantized_layer_and_anywhere_else_otherwise(folder):
    config = engine_config(folder)
    sizes = [split_width(config, 96, OneOf(rank, 4)).size for rank in range(4)]
    assert sizes == ([24] * 4 if config.quantization is None else [32, 32, 16, 16])
    assert split_width(config, 90, OneOf(0, 1)) == Shard.whole(90)


def test_heads_that_are_no_whole_blocks_can_not_be_split_where_the_checkpoint_is_quantized(tmp_path):
    save_qwen3(tmp_path, head_dim=8, num_attention_heads=8, num_hidden_layers=1)
    config = engine_config(quantize_to_nvfp4(tmp_path))
    q = split_heads(8, 8, OneOf(1, 8))
    with pytest.raises(ConfigError, match="a rank would have the values 8 to 15 of 64"):
        RowParallelLinear(config, OneOf(1, 8), PREFIX, q, ("o_proj", 64))


# Experts


@pytest.mark.parametrize("kernels", ["c", "torch"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("ranks", "ep"), [(2, 1), (3, 1), (4, 2), (4, 1)])
def test_terms_of_experts_split_in_width_add_up(tmp_path, ranks, ep, quantized, kernels):
    """5 blocks: shares of 2, 3 or 4 ranks are uneven. Gate and up are each cut, not the two as one."""
    save_qwen3_moe(tmp_path, moe_intermediate_size=80, num_hidden_layers=1)
    if quantized:
        quantize_to_nvfp4(tmp_path)
    generator = torch.Generator().manual_seed(0)
    x, router_logits = torch.randn(9, 64, generator=generator), torch.randn(9, 12, generator=generator)
    rows = GatheredRows(x, *topk_softmax(router_logits, 3, renormalize=True))
    expected = experts_of(tmp_path, kernels, 0, 1, 1).method.apply(rows)
    terms = [experts_of(tmp_path, kernels, rank, ranks, ep).method.apply(rows) for rank in range(ranks)]
    assert all(term.norm() > 0 for term in terms)
    torch.testing.assert_close(torch.stack(terms).sum(0), expected, rtol=1e-4, atol=1e-5)


def experts_of(folder: Path, kernels: str, rank: int, ranks: int, ep: int) -> FusedMoE:
    state = replace(data_parallel_state(OneOf(rank, ranks), rank), ep_size=ep)
    model = ModelRunner(engine_config(folder, cpu_kernels=kernels), state).model
    assert isinstance(model, Qwen3MoeForCausalLM)
    experts = model.decoder[0].mlp.experts
    assert isinstance(experts, FusedMoE)
    return experts
