"""The routed experts of one rank, against one row and one expert at a time in float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nibble.kernels.torch.fused_moe import Nvfp4Experts, fused_moe, fused_moe_nvfp4
from nibble.kernels.torch.nvfp4 import (
    dequantize_nvfp4,
    fake_quantize_nvfp4,
    input_scale_from_amax,
    quantize_nvfp4,
    quantize_nvfp4_weight,
)
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack, unpack

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K = 12, 64, 32, 4


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """Experts as a checkpoint holds them, dequantized with all their scales, beside what the kernel takes."""

    experts: Nvfp4Experts
    gate: Tensor  # float64 [E, I, H]
    up: Tensor  # float64 [E, I, H]
    down: Tensor  # float64 [E, H, I]
    input_scale: Tensor  # fp32 scalar, of w13

    def slice(self, start: int, end: int) -> Nvfp4Experts:
        return Nvfp4Experts(*(getattr(self.experts, field)[start:end] for field in Nvfp4Experts.__dataclass_fields__))


def quantized_layer(seed: int, gate_size: float = 1.0, up_size: float = 1.0) -> QuantizedLayer:
    """Random experts; `gate_size` and `up_size` set how far apart their weight_scale_2 are."""
    generator = torch.Generator().manual_seed(seed)
    input_scale = torch.tensor(4.0 / 2688)
    w13, w2, g1, g2, full = [], [], [], [], []
    w2_input_scale = input_scale_from_amax(torch.rand(EXPERTS, generator=generator) * 4 + 4)
    for expert in range(EXPERTS):
        shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
        sizes = [gate_size, up_size, 1.0]
        gate, up, down = (
            quantize_nvfp4_weight(torch.randn(shape, generator=generator) * size / shape[1] ** 0.5)
            for shape, size in zip(shapes, sizes, strict=True)
        )
        w13.append(torch.cat([dequantize_nvfp4(*gate[:2]), dequantize_nvfp4(*up[:2])]))
        w2.append(dequantize_nvfp4(*down[:2]))
        g1.append(torch.stack([input_scale * gate[2], input_scale * up[2]]))
        g2.append(w2_input_scale[expert] * down[2])
        full.append([dequantize_nvfp4(*weight[:2]).double() * weight[2].double() for weight in (gate, up, down)])
    return QuantizedLayer(
        experts=Nvfp4Experts(torch.stack(w13), torch.stack(w2), torch.stack(g1), w2_input_scale, torch.stack(g2)),
        gate=torch.stack([weights[0] for weights in full]),
        up=torch.stack([weights[1] for weights in full]),
        down=torch.stack([weights[2] for weights in full]),
        input_scale=input_scale,
    )


def routing(seed: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    topk_ids = torch.rand(rows, EXPERTS, generator=generator).topk(TOP_K).indices.int()
    return topk_ids, torch.rand(rows, TOP_K, generator=generator)


def rows_of_x(seed: int, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1000 + seed)).to(dtype)


def float_weights(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2000 + seed)
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5
    return w13.to(dtype), w2.to(dtype)


def dense_reference(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, weight in zip(topk_ids[row].tolist(), topk_weights[row].tolist(), strict=True):
            gate, up = (w13[expert].double() @ x[row].double()).chunk(2)
            out[row] += weight * (w2[expert].double() @ (F.silu(gate) * up))
    return out


def nvfp4_reference(layer: QuantizedLayer, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Every tensor dequantized with all its scales, all products in float64."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    x = fake_quantize_nvfp4(x, layer.input_scale).double() * layer.input_scale.double()
    for row in range(x.shape[0]):
        for expert, weight in zip(topk_ids[row].tolist(), topk_weights[row].tolist(), strict=True):
            hidden = F.silu(layer.gate[expert] @ x[row]) * (layer.up[expert] @ x[row])
            scale = layer.experts.w2_input_scale[expert]
            hidden = fake_quantize_nvfp4(hidden.float().unsqueeze(0), scale)[0].double() * scale.double()
            out[row] += weight * (layer.down[expert] @ hidden)
    return out


class RecordedOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class TestUnquantized:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
    )
    @pytest.mark.parametrize("rows", [1, 7, 40])
    def test_it_is_the_weighted_sum_of_each_rows_experts(self, rows: int, dtype: torch.dtype, tolerance: float) -> None:
        x, (topk_ids, topk_weights), (w13, w2) = (
            rows_of_x(rows, rows, dtype),
            routing(rows, rows),
            float_weights(0, dtype),
        )
        out = fused_moe(x, topk_ids, topk_weights, w13, w2, first_expert=0)
        assert (out.dtype, out.shape) == (dtype, x.shape)
        expected = dense_reference(x, topk_ids, topk_weights, w13, w2)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**16))
    def test_the_partial_sums_of_any_number_of_ranks_add_up_to_the_whole(
        self, ranks: int, rows: int, seed: int
    ) -> None:
        x, (topk_ids, topk_weights), (w13, w2) = (
            rows_of_x(seed, rows),
            routing(seed, rows),
            float_weights(1, torch.float32),
        )
        whole = fused_moe(x, topk_ids, topk_weights, w13, w2, first_expert=0)
        share = EXPERTS // ranks
        parts = [
            fused_moe(x, topk_ids, topk_weights, w13[e : e + share], w2[e : e + share], first_expert=e)
            for e in range(0, EXPERTS, share)
        ]
        assert len(parts) == ranks
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-5, atol=1e-6)

    def test_a_nan_row_affects_its_own_output_row_only(self) -> None:
        x, (topk_ids, topk_weights), (w13, w2) = rows_of_x(0, 9), routing(0, 9), float_weights(0, torch.float32)
        clean = fused_moe(x, topk_ids, topk_weights, w13, w2, first_expert=0)
        x[4, 3] = torch.nan
        out = fused_moe(x, topk_ids, topk_weights, w13, w2, first_expert=0)
        assert out[4].isnan().all()
        others = torch.arange(9) != 4
        assert torch.equal(out[others], clean[others])

    def test_rows_without_an_expert_here_give_exact_zeros_even_when_they_hold_nan(self) -> None:
        x, (w13, w2) = rows_of_x(0, 3), float_weights(0, torch.float32)
        x[0] = torch.nan
        topk_ids = torch.tensor([[-1, -1], [5, 99], [0, 11]], dtype=torch.int32)
        out = fused_moe(x, topk_ids, torch.ones(3, 2), w13[1:4], w2[1:4], first_expert=1)
        assert torch.equal(out, torch.zeros(3, HIDDEN))

    def test_an_id_of_minus_one_is_no_expert_not_the_last_one(self) -> None:
        x, (w13, w2) = rows_of_x(0, 1), float_weights(0, torch.float32)
        padded = fused_moe(x, torch.tensor([[3, -1]], dtype=torch.int32), torch.ones(1, 2), w13, w2, first_expert=0)
        alone = fused_moe(x, torch.tensor([[3]], dtype=torch.int32), torch.ones(1, 1), w13, w2, first_expert=0)
        assert torch.equal(padded, alone)


class TestNvfp4:
    @pytest.mark.parametrize("rows", [1, 2, 16, 40])
    def test_it_is_the_product_of_the_dequantized_tensors(self, rows: int) -> None:
        layer, x, (topk_ids, topk_weights) = quantized_layer(0), rows_of_x(rows, rows), routing(rows, rows)
        x_fp4, x_scale = quantize_nvfp4(x, layer.input_scale)
        out = fused_moe_nvfp4(x_fp4, x_scale, topk_ids, topk_weights, layer.experts, first_expert=0)
        assert (out.dtype, out.shape) == (torch.float32, x.shape)
        expected = nvfp4_reference(layer, x, topk_ids, topk_weights)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)

    def test_quantization_keeps_the_result_near_that_of_the_plain_weights(self) -> None:
        layer, x, (topk_ids, topk_weights) = quantized_layer(1), rows_of_x(1, 32), routing(1, 32)
        out = fused_moe_nvfp4(
            *quantize_nvfp4(x, layer.input_scale), topk_ids, topk_weights, layer.experts, first_expert=0
        )
        plain = dense_reference(x, topk_ids, topk_weights, torch.cat([layer.gate, layer.up], dim=1), layer.down)
        assert 0 < (out - plain).norm() / plain.norm() < 0.25

    @pytest.mark.parametrize(("gate_size", "up_size"), [(1.0, 8.0), (5.0, 0.3)])
    def test_gate_and_up_with_different_weight_scale_2_keep_their_own(self, gate_size: float, up_size: float) -> None:
        layer = quantized_layer(2, gate_size, up_size)
        alphas = layer.experts.g1_gate_up
        assert (alphas[:, 0] / alphas[:, 1] - 1).abs().min() > 0.5
        x, (topk_ids, topk_weights) = rows_of_x(2, 8), routing(2, 8)
        out = fused_moe_nvfp4(
            *quantize_nvfp4(x, layer.input_scale), topk_ids, topk_weights, layer.experts, first_expert=0
        )
        expected = nvfp4_reference(layer, x, topk_ids, topk_weights)
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 20), st.integers(0, 2**16))
    def test_the_partial_sums_of_any_number_of_ranks_add_up_to_the_whole(
        self, ranks: int, rows: int, seed: int
    ) -> None:
        layer, x, (topk_ids, topk_weights) = quantized_layer(3), rows_of_x(seed, rows), routing(seed, rows)
        arguments = (*quantize_nvfp4(x, layer.input_scale), topk_ids, topk_weights)
        whole = fused_moe_nvfp4(*arguments, layer.experts, first_expert=0)
        share = EXPERTS // ranks
        parts = [
            fused_moe_nvfp4(*arguments, layer.slice(e, e + share), first_expert=e) for e in range(0, EXPERTS, share)
        ]
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-5, atol=1e-6)

    def test_the_fields_of_gathered_wire_rows_go_in_as_they_are(self) -> None:
        layer, x, (topk_ids, topk_weights) = quantized_layer(4), rows_of_x(4, 6), routing(4, 6)
        rows = quantize_pack(x, topk_ids, topk_weights, layer.input_scale)
        fields = unpack(rows, WireRowLayout(HIDDEN, TOP_K))
        from_wire = fused_moe_nvfp4(
            fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights, layer.experts, first_expert=0
        )
        direct = fused_moe_nvfp4(
            *quantize_nvfp4(x, layer.input_scale), topk_ids, topk_weights, layer.experts, first_expert=0
        )
        assert torch.equal(from_wire, direct)

    def test_the_sum_is_in_the_order_of_experts_whatever_the_order_of_the_slots(self) -> None:
        layer, x, (topk_ids, topk_weights) = quantized_layer(5), rows_of_x(5, 24), routing(5, 24)
        quantized = quantize_nvfp4(x, layer.input_scale)
        out = fused_moe_nvfp4(*quantized, topk_ids, topk_weights, layer.experts, first_expert=0)
        for _ in range(3):
            slots = torch.randperm(TOP_K)
            again = fused_moe_nvfp4(
                *quantized, topk_ids[:, slots], topk_weights[:, slots], layer.experts, first_expert=0
            )
            assert torch.equal(again, out)

    def test_a_nan_row_affects_its_own_output_row_only(self) -> None:
        layer, x, (topk_ids, topk_weights) = quantized_layer(6), rows_of_x(6, 9), routing(6, 9)
        clean = fused_moe_nvfp4(
            *quantize_nvfp4(x, layer.input_scale), topk_ids, topk_weights, layer.experts, first_expert=0
        )
        x[4, 3] = torch.nan
        out = fused_moe_nvfp4(
            *quantize_nvfp4(x, layer.input_scale), topk_ids, topk_weights, layer.experts, first_expert=0
        )
        assert out[4].isnan().all()
        others = torch.arange(9) != 4
        assert torch.equal(out[others], clean[others])

    def test_rows_without_an_expert_here_give_exact_zeros_even_when_they_hold_nan(self) -> None:
        layer, x = quantized_layer(7), rows_of_x(7, 3)
        x[0] = torch.nan
        topk_ids = torch.tensor([[-1, -1], [5, 99], [0, 11]], dtype=torch.int32)
        quantized = quantize_nvfp4(x, layer.input_scale)
        out = fused_moe_nvfp4(*quantized, topk_ids, torch.ones(3, 2), layer.slice(1, 4), first_expert=1)
        assert torch.equal(out, torch.zeros(3, HIDDEN))


def test_zero_rows_launch_no_kernel_and_keep_the_width() -> None:
    layer, (w13, w2) = quantized_layer(8), float_weights(8, torch.bfloat16)
    x, topk_ids, topk_weights = torch.empty(0, HIDDEN), torch.empty(0, TOP_K, dtype=torch.int32), torch.empty(0, TOP_K)
    with RecordedOperators() as recorded:
        rows = quantize_pack(x, topk_ids, topk_weights, layer.input_scale)
        fields = unpack(rows, WireRowLayout(HIDDEN, TOP_K))
        quantized = fused_moe_nvfp4(
            fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights, layer.experts, first_expert=0
        )
        plain = fused_moe(x.bfloat16(), topk_ids, topk_weights, w13, w2, first_expert=0)
    assert (quantized.shape, quantized.dtype) == ((0, HIDDEN), torch.float32)
    assert (plain.shape, plain.dtype) == ((0, HIDDEN), torch.bfloat16)
    allocations_and_views = {"new_zeros", "zeros", "new_empty", "empty_like", "_to_copy", "slice", "view", "detach"}
    assert recorded.names <= allocations_and_views
