"""NVFP4 layers against float64: scales that differ between merged parts, between experts and between ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoints import COMMON
from nibble.distributed.communicator import SingleRankCommunicator
from nibble.kernels.select import select_kernels
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, quantize_nvfp4, quantize_nvfp4_weight
from nibble.layers.dp_attention import DpStep, dp_step
from nibble.layers.moe.fused_moe import FusedMoE
from nibble.layers.moe.token_dispatcher import AllGatherDispatcher, Fp4AllGatherDispatcher, GatheredRows
from nibble.layers.quantization.modelopt_quant import ModelOptNvFp4FusedMoEMethod, ModelOptNvFp4Linear
from nibble.layers.weights import Shard, WeightTarget
from nibble.utils.errors import ConfigError
from runners import data_parallel_state, engine_config

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 32, 12, 3
PREFIX = "model.layers.0.mlp.experts"
KERNELS = select_kernels("c", "c")


class Module:
    """One matrix [N, K] as a checkpoint stores it, with scales of its own, and its float64 value."""

    def __init__(self, rows: int, columns: int, size: float, amax: float, seed: int) -> None:
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size
        self.weight, self.weight_scale, self.weight_scale_2 = quantize_nvfp4_weight(weight)
        self.input_scale = torch.tensor(amax / 2688)
        self.value = dequantize_nvfp4(self.weight, self.weight_scale).double() * self.weight_scale_2.double()

    def load(self, targets: dict[str, WeightTarget | None], prefix: str) -> None:
        for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            target = targets[f"{prefix}.{suffix}"]
            if target is not None:
                target.load(getattr(self, suffix))


def quantized(x: Tensor, input_scale: Tensor) -> Tensor:
    """The float64 values that a matrix product sees of `x`."""
    return dequantize_nvfp4(*quantize_nvfp4(x.float(), input_scale)).double() * input_scale.double()


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected).norm() / expected.norm())


def random_rows(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


# Linear layers


@pytest.fixture
def qkv() -> list[Module]:
    """q, k and v whose weight_scale_2 are apart by factors of 4 and whose input_scale differ."""
    shapes = [(96, 1.0, 3.0), (32, 4.0, 7.0), (48, 0.25, 5.0)]
    return [Module(rows, HIDDEN, size, amax, seed) for seed, (rows, size, amax) in enumerate(shapes)]


def merged(modules: list[Module], bias: Tensor | None, dtype: torch.dtype) -> ModelOptNvFp4Linear:
    names = ("q_proj", "k_proj", "v_proj")
    parts = [(name, Shard.whole(len(module.weight))) for name, module in zip(names, modules, strict=True)]
    layer = ModelOptNvFp4Linear(KERNELS, Shard.whole(HIDDEN), parts, bias is not None, dtype)
    targets = layer.weight_targets("attn")
    for name, module in zip(names, modules, strict=True):
        module.load(targets, f"attn.{name}")
    if bias is not None:
        for (name, _), part in zip(parts, bias.split([rows.size for _, rows in parts]), strict=True):
            targets[f"attn.{name}.bias"].load(part)
    layer.process_weights_after_loading()
    return layer


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_merged_linear_keeps_the_weight_scale_2_of_every_part(qkv, with_bias):
    bias = torch.randn(176, generator=torch.Generator().manual_seed(9)) if with_bias else None
    x = random_rows(20)
    largest = torch.tensor(7.0 / 2688)
    expected = quantized(x, largest) @ torch.cat([module.value for module in qkv]).t()
    if bias is not None:
        expected += bias.double()
    ours = merged(qkv, bias, torch.float32)(x)
    # Part by part: an error in the smallest would drown in the largest.
    for part, wanted in zip(ours.split([96, 32, 48], 1), expected.split([96, 32, 48], 1), strict=True):
        assert relative_error(part, wanted) < 1e-6


def test_a_merged_linear_quantizes_its_input_once_with_the_largest_input_scale(qkv):
    assert merged(qkv, None, torch.float32).input_scale == torch.tensor(7.0 / 2688)


def test_in_bf16_only_the_output_is_rounded(qkv):
    x = random_rows(20).bfloat16()
    ours = merged(qkv, None, torch.bfloat16)(x)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, merged(qkv, None, torch.float32)(x.float()).bfloat16())


def test_a_linear_of_no_rows_gives_no_rows(qkv):
    ours = merged(qkv, torch.zeros(176), torch.float32)(torch.empty(0, HIDDEN))
    assert (ours.shape, ours.dtype) == ((0, 176), torch.float32)


def test_a_linear_whose_input_is_not_made_of_blocks_is_refused():
    parts = [("o_proj", Shard.whole(64))]
    with pytest.raises(ConfigError, match="multiple of 16 values, got 40"):
        ModelOptNvFp4Linear(KERNELS, Shard.whole(40), parts, False, torch.float32)


# Experts


class Experts:
    """The modules of all experts: gate and up with different weight_scale_2, every input_scale different."""

    def __init__(self, width: int = WIDTH) -> None:
        self.gate = [Module(width, HIDDEN, 0.1 * (1 + e % 3), 4 + (5 * e % EXPERTS) / 8, e) for e in range(EXPERTS)]
        self.up = [Module(width, HIDDEN, 0.8 / (1 + e % 3), 4 + e / 9, 20 + e) for e in range(EXPERTS)]
        self.down = [Module(HIDDEN, width, 0.2, 1 + e / 2, 40 + e) for e in range(EXPERTS)]
        self.input_scale = torch.stack([module.input_scale for module in self.gate + self.up]).amax()

    def load(self, layer: FusedMoE) -> FusedMoE:
        targets = layer.weight_targets(PREFIX)
        for name, modules in (("gate_proj", self.gate), ("up_proj", self.up), ("down_proj", self.down)):
            for expert, module in enumerate(modules):
                module.load(targets, f"{PREFIX}.{expert}.{name}")
        layer.process_weights_after_loading()
        return layer

    def forward(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """float64 [T, H], row by row."""
        out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
        values = quantized(x, self.input_scale)
        for row, (ids, weights) in enumerate(zip(topk_ids.tolist(), topk_weights.tolist(), strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate, up = self.gate[expert].value @ values[row], self.up[expert].value @ values[row]
                hidden = quantized((gate * gate.sigmoid() * up).unsqueeze(0), self.down[expert].input_scale)
                out[row] += weight * (self.down[expert].value @ hidden[0])
        return out


@pytest.fixture(scope="module")
def experts() -> Experts:
    return Experts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"), WIDTH)


def write_config(path: Path, width: int) -> Path:
    """A checkpoint's description, without weights."""
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "moe_intermediate_size": width}
    config = {**COMMON, **moe, "hidden_size": HIDDEN, "rms_norm_eps": 1e-6, "architectures": ["Qwen3MoeForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4", "group_size": 16}}')
    return path


def make_layer(folder: Path, rank: int = 0, world_size: int = 1, **args: object) -> FusedMoE:
    """The layer of one rank of several; its peers are only needed for the collectives."""
    group = SingleRankCommunicator("dp")
    group.rank, group.world_size = rank, world_size
    return FusedMoE(engine_config(folder, load_format="dummy", **args), data_parallel_state(group, rank), PREFIX)


def both_dispatchers(folder: Path, experts: Experts, dtype: str) -> tuple[FusedMoE, FusedMoE]:
    """The same layer with the FP4 gather on and off."""
    flags = {"enable_flashinfer_cutlass_moe": True, "enable_dp_attention": True, "dtype": dtype}
    on = experts.load(make_layer(folder, **flags))
    off = experts.load(make_layer(folder, **flags, disable_flashinfer_cutlass_moe_fp4_allgather=True))
    assert isinstance(on.dispatcher, Fp4AllGatherDispatcher)
    assert isinstance(off.dispatcher, AllGatherDispatcher)
    return on, off


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def on_and_off(request, folder, experts) -> tuple[FusedMoE, FusedMoE]:
    return both_dispatchers(folder, experts, request.param)


def forward(layer: FusedMoE, x: Tensor, router_logits: Tensor) -> Tensor:
    with dp_step(DpStep(data_parallel_state(SingleRankCommunicator("dp")), (len(x),), (len(x),))):
        return layer(x, router_logits)


def nvfp4_method(layer: FusedMoE) -> ModelOptNvFp4FusedMoEMethod:
    assert isinstance(layer.method, ModelOptNvFp4FusedMoEMethod)
    return layer.method


def routing(rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K]
    return ids.int(), torch.rand(rows, TOP_K, generator=generator)


def test_gate_and_up_with_different_weight_scale_2_are_not_merged(folder, experts):
    """Merged into one, the weight_scale_2 of gate and up would change products up to eightfold."""
    ratios = [gate.weight_scale_2 / up.weight_scale_2 for gate, up in zip(experts.gate, experts.up, strict=True)]
    assert min(ratios) < 0.2
    assert max(ratios) > 1
    assert_computes(experts, experts.load(make_layer(folder)))


def assert_computes(experts: Experts, layer: FusedMoE) -> None:
    """The layer gives what the modules give one by one in float64."""
    x, (topk_ids, topk_weights) = random_rows(40), routing(40)
    ours = layer.method.apply(GatheredRows(x, topk_ids, topk_weights))
    expected = experts.forward(x, topk_ids, topk_weights)
    # An intermediate value that lies on a tie for float64 may fall the other way, which shows in its own row only.
    errors = [relative_error(ours[row], expected[row]) for row in range(len(x))]
    assert sum(error < 1e-5 for error in errors) >= 38
    assert max(errors) < 0.1


def test_w13_holds_gate_before_up_in_codes_block_scales_and_global_scales_alike(folder, experts):
    """A kernel that wants up before gate has to turn all three around."""
    layer = make_layer(folder)
    method = nvfp4_method(layer)
    method.kernels = replace(method.kernels, nvfp4_moe=lambda packed, first_expert, num_experts: packed)
    experts.load(layer)
    packed = method.kernel
    for expert, (gate, up) in enumerate(zip(experts.gate, experts.up, strict=True)):
        assert torch.equal(packed.w13[expert], torch.cat([gate.weight, up.weight]))
        assert_same_bits(packed.w13_scales[expert], torch.cat([gate.weight_scale, up.weight_scale]))
        assert torch.equal(
            packed.g1_gate_up[expert], experts.input_scale * torch.stack([gate.weight_scale_2, up.weight_scale_2])
        )


@pytest.mark.parametrize("kernels", ["c", "torch"])
@pytest.mark.parametrize("width", [16, 48, 80])
def test_gate_and_up_of_an_odd_number_of_blocks_are_not_padded_as_one(tmp_path, width, kernels):
    """Padding at the end of both would move where up begins."""
    experts = Experts(width)
    assert_computes(experts, experts.load(make_layer(write_config(tmp_path, width), cpu_kernels=kernels)))


def test_experts_whose_width_is_not_made_of_blocks_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="multiples of 16, got hidden 64, width 40"):
        make_layer(write_config(tmp_path, 40))


@pytest.mark.parametrize("kernels", ["c", "torch"])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 2), (1, 2)])
def test_pad_rows_reach_no_expert(folder, experts, rank, world_size, kernels):
    """Their experts are -1, and they may hold anything."""
    method = nvfp4_method(experts.load(make_layer(folder, rank, world_size, cpu_kernels=kernels)))
    x, (topk_ids, topk_weights) = random_rows(12), routing(12)
    expected = method.apply(GatheredRows(x, topk_ids, topk_weights))
    pads = torch.tensor([0, 5, 11])
    x[pads], topk_ids[pads], topk_weights[pads] = torch.nan, -1, torch.nan
    expected[pads] = 0
    torch.testing.assert_close(method.apply(GatheredRows(x, topk_ids, topk_weights)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_quantizes_with_the_largest_input_scale_of_all_experts_not_of_its_own(folder, experts, world_size):
    local_maxima = set()
    for rank in range(world_size):
        method = nvfp4_method(experts.load(make_layer(folder, rank, world_size)))
        assert method.input_scale == experts.input_scale
        local = [module.input_scale for e in method.experts for module in (experts.gate[e], experts.up[e])]
        local_maxima.add(float(max(local)))
    assert len(local_maxima) == world_size, "a maximum over local experts would differ from rank to rank"


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_work_and_the_rows_of_other_ranks_experts_count_as_zero(folder, experts, world_size):
    x, (topk_ids, topk_weights) = random_rows(30), routing(30)
    rows = GatheredRows(x, topk_ids, topk_weights)
    alone = experts.load(make_layer(folder)).method.apply(rows)
    total = torch.zeros_like(alone)
    for rank in range(world_size):
        method = nvfp4_method(experts.load(make_layer(folder, rank, world_size)))
        partial = method.apply(rows)
        elsewhere = ~torch.isin(topk_ids, torch.tensor(method.experts)).any(dim=1)
        assert elsewhere.any()
        assert not partial[elsewhere].any()
        total += partial
    torch.testing.assert_close(total, alone, rtol=1e-5, atol=1e-6)


# Quantized before or after the gather


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 9), seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-4, 0.1, 1.0, 30.0]))
def test_fp4_gather_on_and_off_give_the_same_bits(on_and_off, rows, seed, size):
    on, off = on_and_off
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, HIDDEN, generator=generator) * size).to(nvfp4_method(on).dtype)
    router_logits = torch.randn(rows, EXPERTS, generator=generator)
    assert_same_bits(forward(on, x, router_logits), forward(off, x, router_logits))


def test_zeros_infinities_and_nan_give_the_same_bits_too_and_stay_in_their_rows(on_and_off):
    on, off = on_and_off
    x = random_rows(6).to(nvfp4_method(on).dtype)
    router_logits = torch.randn(6, EXPERTS, generator=torch.Generator().manual_seed(4))
    clean = forward(off, x, router_logits)
    x[1] = 0
    x[2, 3] = torch.inf
    x[4, 5] = torch.nan
    results = forward(on, x, router_logits), forward(off, x, router_logits)
    assert_same_bits(*results)
    for result in results:
        assert torch.equal(result[[0, 3, 5]], clean[[0, 3, 5]])
        assert not result[1].any()
        assert result[2].isfinite().all()
        assert result[4].isnan().all()


@pytest.mark.parametrize("which", [0, 1])
def test_no_rows_on_any_rank_give_no_rows(on_and_off, which):
    layer = on_and_off[which]
    x = torch.empty(0, HIDDEN, dtype=nvfp4_method(layer).dtype)
    out = forward(layer, x, torch.empty(0, EXPERTS, dtype=x.dtype))
    assert (out.shape, out.dtype) == (x.shape, x.dtype)


def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
