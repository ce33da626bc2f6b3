"""The Triton twin of the NVFP4 linear layer, interpreted.

Where there is a GPU, test/gpu/test_fused_moe_gpu.py runs it compiled instead.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fused_moe_cases as cases
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, quantize_nvfp4_weight
from nibble.kernels.torch.nvfp4_linear import Nvfp4Linear as TorchLinear
from nibble.kernels.triton import nvfp4_linear, nvfp4_tiles
from nibble.kernels.triton.nvfp4_linear import Nvfp4Linear
from nibble.kernels.triton.nvfp4_tiles import Tiling
from wire_row_cases import poisoned_allocations

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested in test/gpu")


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> Iterator[None]:
    with np.errstate(all="ignore"), poisoned_allocations():
        yield


def layer(seed: int, rows: int, columns: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    values, scales, scale_2 = quantize_nvfp4_weight(torch.randn(rows, columns, generator=generator))
    alpha = cases.INPUT_SCALE * scale_2 * (torch.rand(rows, generator=generator) + 0.5)
    return values, scales, cases.INPUT_SCALE, alpha


def random_x(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 140),
    st.integers(1, 200),
    st.integers(1, 40).map(lambda blocks: blocks * 16),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 2**16),
)
def test_any_shape_gives_what_torch_gives(x_rows: int, rows: int, columns: int, processors: int, seed: int) -> None:
    weights, x = layer(seed, rows, columns), random_x(seed, x_rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvfp4_linear, "num_multiprocessors", lambda device: processors)  # decides on splits
        out = Nvfp4Linear(*weights, dtype=torch.float32)(x)
    torch.testing.assert_close(out, TorchLinear(*weights)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tiling", cases.TILINGS, ids=str)
def test_every_tiling_gives_what_torch_gives(tiling: Tiling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nvfp4Linear, "choose_tiling", lambda self, rows: tiling)
    weights, x = layer(0, 136, 512), random_x(0, 40, 512)
    out = Nvfp4Linear(*weights, dtype=torch.float32)(x)
    torch.testing.assert_close(out, TorchLinear(*weights)(x), rtol=1e-5, atol=1e-5)


def test_every_code_with_every_scale_is_unpacked_exactly() -> None:
    values = torch.arange(256).to(torch.uint8).repeat(127, 1)  # [127, 256], a row for every finite scale
    scales = torch.arange(127).to(torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
    linear = Nvfp4Linear(values, scales, torch.tensor(1.0), torch.ones(127), dtype=torch.float32)
    out = linear(torch.eye(512) * 6)  # quantized to themselves
    assert torch.equal(out.t(), dequantize_nvfp4(values, scales) * 6)


def test_the_scale_of_a_weight_block_that_is_nan_gives_nan() -> None:
    values, scales, input_scale, alpha = layer(1, 4, 64)
    scales.view(torch.uint8)[2, 1] = 0x7F
    out = Nvfp4Linear(values, scales, input_scale, alpha)(random_x(1, 3, 64))
    assert out.isnan().all(dim=0).tolist() == [False, False, True, False]
    assert not out[:, [0, 1, 3]].isnan().any()


def test_a_nan_poisons_its_own_row_only_and_the_order_of_rows_does_not_matter() -> None:
    weights, x = layer(2, 40, 208), random_x(2, 20, 208)
    linear = Nvfp4Linear(*weights)
    clean = linear(x)
    assert clean.dtype == torch.bfloat16
    order = torch.randperm(20)
    assert torch.equal(linear(x[order]), clean[order])
    x[7, 100] = torch.nan
    out = linear(x)
    assert out[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(out[others], clean[others])


def test_rows_may_be_views_that_are_not_contiguous() -> None:
    linear, x = Nvfp4Linear(*layer(3, 40, 64)), random_x(3, 12, 192)
    for view in (x[:, 64:128], x[::2, ::3], x.t()[:64, :12].t()):
        assert torch.equal(linear(view), linear(view.contiguous()))


def test_zero_rows_launch_nothing_and_keep_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Nvfp4Linear(*layer(4, 40, 64))
    for kernel in ("_quantize_kernel", "_linear_kernel", "_sum_kernel"):
        monkeypatch.setattr(nvfp4_linear, kernel, None)
    out = linear(torch.empty(0, 64, dtype=torch.bfloat16))
    assert (out.shape, out.dtype) == ((0, 40), torch.bfloat16)


def test_a_tiling_takes_as_many_stages_as_shared_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    tiling, device = Tiling(128, 128, 128, 128, 8, 4, 1), torch.device("cpu")
    stage = 128 * 128 * 2 + 128 * 128 // 2 + 128 * 128 // 16  # x in fp16, codes, scales
    for available, stages in ((4 * stage, 4), (4 * stage - 1, 3), (2 * stage, 2), (9 * stage, 4)):
        monkeypatch.setattr(nvfp4_tiles, "_shared_memory", lambda device, available=available: available)
        assert tiling.stages(device) == stages


@pytest.mark.parametrize(("columns", "step"), [(256, 256), (384, 128), (1024, 256)])
def test_a_step_divides_the_padded_columns(columns: int, step: int) -> None:
    assert Tiling(16, 16, 64, 256, 4, 4, 3).step(columns) == step
