"""The C kernels compute what the torch kernels compute: the quantizer bit for bit, the rest to fp32 rounding."""

import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_moe_cases
from nibble.kernels.cpu import norm as c_norm
from nibble.kernels.cpu import nvfp4 as c_nvfp4
from nibble.kernels.cpu.library import c_kernels
from nibble.kernels.cpu.linear import linear as c_linear
from nibble.kernels.cpu.sampling import argmax as c_argmax
from nibble.kernels.cpu.topk import topk_softmax as c_topk_softmax
from nibble.kernels.torch import fused_moe as torch_moe
from nibble.kernels.torch import norm as torch_norm
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, fake_quantize_nvfp4, quantize_nvfp4, quantize_nvfp4_weight
from nibble.kernels.torch.nvfp4_linear import Nvfp4Linear
from nibble.kernels.torch.sampling import argmax
from nibble.kernels.torch.topk import topk_softmax
from nibble.kernels.torch.wire_row import WireRowLayout, quantize_pack, unpack
from nibble.utils import c_library
from nibble.utils.c_library import CompileError, build_c_library

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 48, 6, 3


def c_fake_quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    codes, factors = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), x.shape[1] // 16, 2)
    c_kernels().quantize_rows(x.data_ptr(), *x.shape, scale, codes.data_ptr(), factors.data_ptr())
    values = codes.float().abs() / 2
    return torch.where(x.signbit(), -values, values) * factors[..., 0].repeat_interleave(16, 1)


def bits(x: torch.Tensor) -> torch.Tensor:
    """For exact comparison; all NaN count as one."""
    return torch.where(x.isnan(), torch.full_like(x, torch.inf), x).view(torch.int32)


def routed(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, generator=generator)
    ids = torch.rand(rows, EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(torch.int32)
    return x, ids, torch.rand(rows, TOP_K, generator=generator)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 0.37, 1e-30, 1e30])
def test_the_quantizer_agrees_bit_for_bit_on_every_bf16_pattern(scale):
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    blocks = patterns.view(-1, 16)
    repeated = patterns.view(-1, 1).expand(-1, 16).contiguous()  # each pattern as its block's maximum
    for x in (blocks, repeated, patterns[torch.randperm(65536)].view(-1, 16).contiguous()):
        expected = fake_quantize_nvfp4(x, torch.tensor(scale))
        assert torch.equal(bits(c_fake_quantize(x, scale)), bits(expected))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    blocks=st.integers(1, 8),
    top_k=st.integers(1, 8),
    exponent=st.integers(-12, 6),
    seed=st.integers(0, 10**6),
)
def test_wire_rows_are_the_same_bytes(rows, blocks, top_k, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16 * blocks, generator=generator) * 10.0**exponent
    x[torch.rand(x.shape, generator=generator) < 0.2] = 0.0
    if rows > 1:
        x[0, 0], x[1, 3] = torch.nan, -torch.inf
    ids = torch.randint(-1, 9, (rows, top_k), dtype=torch.int32, generator=generator)
    arguments = (x, ids, torch.rand(rows, top_k, generator=generator), torch.tensor(3e-3))
    ours, expected = c_nvfp4.quantize_pack(*arguments), quantize_pack(*arguments)
    layout = WireRowLayout(16 * blocks, top_k)
    assert torch.equal(ours[:, layout.scale_offset :], expected[:, layout.scale_offset :])
    values = [dequantize_nvfp4(unpack(wire, layout).x_fp4, unpack(wire, layout).x_scale) for wire in (ours, expected)]
    assert torch.equal(bits(values[0]), bits(values[1]))
    finite = ~x.isnan().any(1)
    assert torch.equal(ours[finite], expected[finite])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17, 64, 65])
@pytest.mark.parametrize("outputs", [8, 36, 10])
def test_the_linear_layer_agrees(rows, outputs):
    torch.manual_seed(rows)
    values, scales, scale_2 = quantize_nvfp4_weight(torch.randn(outputs, HIDDEN))
    arguments = (values, scales, torch.tensor(2e-3), torch.rand(outputs) * scale_2)
    x = torch.randn(rows, HIDDEN)
    torch.testing.assert_close(c_nvfp4.Nvfp4Linear(*arguments)(x), Nvfp4Linear(*arguments)(x), rtol=1e-5, atol=1e-6)


def packed_experts() -> torch_moe.PackedNvfp4Experts:
    torch.manual_seed(5)
    w13 = [quantize_nvfp4_weight(torch.randn(2 * WIDTH, HIDDEN)) for _ in range(EXPERTS)]
    w2 = [quantize_nvfp4_weight(torch.randn(HIDDEN, WIDTH)) for _ in range(EXPERTS)]
    w2_input_scale = torch.rand(EXPERTS) * 1e-2 + 1e-3
    return torch_moe.PackedNvfp4Experts(
        *(torch.stack([expert[part] for expert in stack]) for stack in (w13, w2) for part in (0, 1)),
        g1_gate_up=torch.rand(EXPERTS, 2) * 1e-5,
        w2_input_scale=w2_input_scale,
        g2=w2_input_scale * torch.stack([expert[2] for expert in w2]),
    )


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 40, 300])
def test_the_experts_agree(rows):
    packed = packed_experts()
    x, ids, weights = routed(rows, seed=rows)
    x_fp4, x_scale = quantize_nvfp4(x, torch.tensor(2e-3))
    for first in (0, 3, -2):
        arguments = (x_fp4, x_scale, ids, weights)
        ours = c_nvfp4.Nvfp4MoE(packed, first)(*arguments)
        expected = torch_moe.Nvfp4MoE(packed, first)(*arguments)
        # The second quantization may turn the last bit of an intermediate value into a step of FP4.
        assert float((ours - expected).norm()) <= 2e-3 * float(expected.norm())
        different = (ours - expected).abs().amax(1) > 1e-4 * expected.abs().max() if rows else torch.zeros(0)
        assert int(different.sum()) <= 0.05 * rows


def test_a_row_may_name_an_expert_more_than_once():
    packed = packed_experts()
    x, ids, weights = routed(9, seed=3)
    ids[:] = 2
    x_fp4, x_scale = quantize_nvfp4(x, torch.tensor(2e-3))
    ours = c_nvfp4.Nvfp4MoE(packed, 0)(x_fp4, x_scale, ids, weights)
    expected = torch_moe.Nvfp4MoE(packed, 0)(x_fp4, x_scale, ids, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_experts_read_gathered_rows_in_place():
    packed, layout = packed_experts(), WireRowLayout(HIDDEN, TOP_K)
    x, ids, weights = routed(9, seed=1)
    fields = unpack(quantize_pack(x, ids, weights, torch.tensor(2e-3)), layout)
    moe = c_nvfp4.Nvfp4MoE(packed, 0)
    expected = moe(*quantize_nvfp4(x, torch.tensor(2e-3)), ids, weights)
    assert torch.equal(moe(fields.x_fp4, fields.x_scale, fields.topk_ids, fields.topk_weights), expected)


def test_a_row_of_experts_depends_on_nothing_but_itself():
    moe = c_nvfp4.Nvfp4MoE(packed_experts(), 0)
    x, ids, weights = routed(11, seed=2)
    x[4, 5] = torch.nan
    x_fp4, x_scale = quantize_nvfp4(x, torch.tensor(2e-3))
    together = moe(x_fp4, x_scale, ids, weights)
    for row in range(11):
        one = slice(row, row + 1)
        assert torch.equal(bits(moe(x_fp4[one], x_scale[one], ids[one], weights[one])), bits(together[one]))
    assert together.isnan().any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (3, 20), (1, 7), (0, 64)])
def test_rms_norm_agrees_on_contiguous_rows_and_on_views(rows, columns):
    torch.manual_seed(0)
    weight, wide = torch.randn(columns), torch.randn(rows, 2 * columns)
    for x in (wide[:, :columns].contiguous(), wide[:, :columns], wide[:, ::2]):
        torch.testing.assert_close(
            c_norm.rms_norm(x, weight, 1e-6), torch_norm.rms_norm(x, weight, 1e-6), rtol=2e-6, atol=1e-6
        )


@pytest.mark.parametrize(("heads", "size"), [(1, 16), (4, 64), (3, 20)])
def test_heads_are_normalized_and_rotated_in_place_of_a_wider_row(heads, size):
    torch.manual_seed(0)
    qkv = torch.randn(5, 2 * heads, size)
    weights, positions = torch.randn(2, size), torch.tensor([0, 3, 1, 9, 9])
    tables = torch.randn(10, size), torch.randn(10, size)
    for x in (qkv, qkv[:, ::2], qkv[:0]):
        q, k = x[:, :heads], x[:, heads:]
        arguments = (q, k, *weights, 1e-6, positions[: len(x)], *tables)
        for ours, expected in zip(c_norm.qk_norm_rope(*arguments), torch_norm.qk_norm_rope(*arguments), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("experts", "top_k"), [(24, 4), (128, 8), (5, 5), (256, 1)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_router_chooses_the_same_experts(experts, top_k, renormalize):
    torch.manual_seed(experts)
    logits = torch.randn(7, experts) * 4
    ids, weights = c_topk_softmax(logits, top_k, renormalize)
    expected_ids, expected = topk_softmax(logits, top_k, renormalize)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "columns", "outputs"), [(1, 16, 1), (3, 20, 17), (16, 256, 24), (0, 8, 8), (99, 64, 99)]
)
def test_a_small_linear_layer_agrees(rows, columns, outputs):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, columns), torch.randn(outputs, columns)
    torch.testing.assert_close(c_linear(x, weight, None), x @ weight.T, rtol=1e-5, atol=1e-4)
    bias = torch.randn(outputs)
    torch.testing.assert_close(c_linear(x, weight, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [1, 16, 40, 896])
@pytest.mark.parametrize("kernel", [argmax, c_argmax])
def test_the_greedy_choice_is_the_first_of_the_largest_and_none_in_a_row_that_is_not_finite(kernel, columns):
    torch.manual_seed(columns)
    logits = torch.randn(9, columns).round(decimals=1)
    logits[:, -1] = logits.amax(1)
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert kernel(logits).tolist() == expected
    for row, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        logits[row, columns // 2] = bad
    assert kernel(logits).tolist() == [-1, -1, -1, *expected[3:]]


def test_equal_experts_come_in_order_and_a_row_with_nan_stays_in_range_and_nan():
    logits = torch.zeros(3, 20)
    logits[1, 7] = torch.nan
    ids, weights = c_topk_softmax(logits, 4, True)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    assert weights[[0, 2]].tolist() == [[0.25] * 4] * 2
    assert weights[1].isnan().all()


@pytest.mark.parametrize("flags", [["-mavx2", "-mfma"], []], ids=["AVX2", "none"])
def test_processors_without_vector_extensions_compute_the_same(flags, monkeypatch, tmp_path):
    """The integer product is written out for AVX-512 and AVX2; everything else is left to the compiler."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    packed, x = packed_experts(), torch.randn(7, HIDDEN)
    values, scales, _ = quantize_nvfp4_weight(torch.randn(40, HIDDEN))
    _, ids, weights = routed(7, seed=0)
    moe = c_nvfp4.Nvfp4MoE(packed, 0)
    linear = c_nvfp4.Nvfp4Linear(values, scales, torch.tensor(2e-3), torch.rand(40))
    fields = quantize_nvfp4(x, torch.tensor(2e-3))

    def results() -> list[torch.Tensor]:
        return [linear(x), moe(*fields, ids, weights), c_nvfp4.quantize_pack(x, ids, weights, torch.tensor(2e-3))]

    expected = results()
    monkeypatch.setattr(c_library, "_FLAGS", [flag for flag in c_library._FLAGS if flag != "-march=native"] + flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build_c_library.cache_clear()
    c_kernels.cache_clear()
    try:
        for ours, native in zip(results(), expected, strict=True):
            torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-4 * float(native.float().abs().max()))
        assert list((tmp_path / "nibble").iterdir())
    finally:
        monkeypatch.undo()
        build_c_library.cache_clear()
        c_kernels.cache_clear()


def test_a_source_is_compiled_once_and_an_error_shows_what_the_compiler_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build_c_library.cache_clear()
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder, value in ((good, "ONE"), (bad, "undeclared")):
        folder.mkdir()
        (folder / "one.h").write_text("#define ONE 1")
        (folder / "one.c").write_text(f'#include "one.h"\nint one(void) {{ return {value}; }}')
    library = build_c_library(good)
    written = library.stat().st_mtime_ns
    build_c_library.cache_clear()
    assert build_c_library(good) == library and library.stat().st_mtime_ns == written
    with pytest.raises(CompileError, match="undeclared"):
        build_c_library(bad)
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    (good / "one.h").write_text("#define ONE 2")
    build_c_library.cache_clear()
    assert build_c_library(good) != library, "a header is part of the source"
    monkeypatch.setattr(c_library.shutil, "which", lambda _: None)
    build_c_library.cache_clear()
    with pytest.raises(CompileError, match="no C compiler"):
        build_c_library(good)
    monkeypatch.undo()
    build_c_library.cache_clear()


@pytest.mark.parametrize("experts", [c_nvfp4.Nvfp4MoE, torch_moe.Nvfp4MoE], ids=["c", "torch"])
def test_experts_leave_their_result_where_told(experts: type[c_nvfp4.Nvfp4MoE] | type[torch_moe.Nvfp4MoE]) -> None:
    packed = fused_moe_cases.random_experts(0, 6, 80, 48)
    batch = fused_moe_cases.random_batch(1, 5, 80, 3, -1, 8)
    fused_moe_cases.assert_leaves_result_where_told(experts(packed, 0), batch, 80)
    fused_moe_cases.assert_leaves_fp8_rows_where_told(experts(packed, 0), batch, 80)
