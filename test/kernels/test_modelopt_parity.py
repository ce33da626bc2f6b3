"""nvidia-modelopt's own quantizers, which make the checkpoints, against ours."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from nibble.kernels.torch.nvfp4 import (
    dequantize_nvfp4,
    fake_quantize_nvfp4,
    input_scale_from_amax,
    quantize_nvfp4,
    quantize_nvfp4_weight,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about the version of transformers
    mtq = pytest.importorskip("modelopt.torch.quantization")
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    quant_utils = pytest.importorskip("modelopt.torch.export.quant_utils")

BLOCK_SIZES = {-1: 16}


def modelopt_quantize(x: Tensor, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, block scales and global scale, all made by modelopt."""
    quantized, scales, global_scale = qtensor.NVFP4QTensor.quantize(
        x.clone(), 16, weights_scaling_factor_2=global_scale
    )
    return quantized._quantized_data, scales, global_scale


def modelopt_fake_quantize(x: Tensor, _block_size: int, amax: Tensor, *_bits: int) -> Tensor:
    """Stands in for modelopt's CUDA operator, with modelopt's own torch code."""
    quantized, scales, global_scale = qtensor.NVFP4QTensor.quantize(
        x.clone(), 16, weights_scaling_factor_2=amax.float() / (6 * 448)
    )
    return quantized.dequantize(dtype=x.dtype, scale=scales, double_scale=global_scale, block_sizes=BLOCK_SIZES)


def random_blocks(seed: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Normal values in blocks whose sizes differ by up to 2^8, small enough for e4m3 to hold all scales."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(rows, columns // 16, 1, generator=generator).mul_(8)
    blocks = torch.randn(rows, columns // 16, 16, generator=generator)
    return (blocks * torch.exp2(-exponents)).view(rows, columns).to(dtype)


@pytest.fixture(scope="module")
def calibration() -> Tensor:
    return random_blocks(5, 64, 128, torch.float32)


@pytest.fixture(scope="module")
def linear(calibration: Tensor) -> Iterator[nn.Linear]:
    """A linear layer calibrated by modelopt, with fake quantization that runs on a CPU."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 96, bias=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tensor_quant, "dynamic_block_quantize_op", modelopt_fake_quantize)
        mtq.quantize(nn.Sequential(linear), mtq.NVFP4_DEFAULT_CFG, lambda model: model(calibration))
        yield linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(8))
def test_a_weight_gets_the_same_bytes_as_from_modelopt(seed: int, dtype: torch.dtype) -> None:
    weight = random_blocks(seed, 256, 512, dtype)
    packed, scales, weight_scale_2 = quantize_nvfp4_weight(weight)
    expected_packed, expected_scales, expected_scale_2 = modelopt_quantize(weight)
    assert torch.equal(weight_scale_2, expected_scale_2)
    assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))
    assert torch.equal(packed, expected_packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("relative_amax", [0.25, 1.0, 1.7, 4.0])
def test_an_activation_gets_the_same_bytes_as_from_modelopt(relative_amax: float, dtype: torch.dtype) -> None:
    x = random_blocks(9, 256, 512, dtype)
    input_scale = input_scale_from_amax(x.float().abs().amax() * relative_amax)
    packed, scales = quantize_nvfp4(x, input_scale)
    expected_packed, expected_scales, _ = modelopt_quantize(x, input_scale)
    assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))
    assert torch.equal(packed, expected_packed)


def test_ties_between_two_codes_fall_the_same_way_as_in_modelopt() -> None:
    # Multiples of 1/32 with power-of-two scales: one value in eight is exactly between two codes.
    x = torch.randint(-192, 193, (512, 256), generator=torch.Generator().manual_seed(0)) / 32
    x[:, ::16] = 6.0
    packed, scales = quantize_nvfp4(x, torch.tensor(2.0**-5))
    expected_packed, expected_scales, _ = modelopt_quantize(x, torch.tensor(2.0**-5))
    assert (scales.float() == 32).all()
    assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))
    assert torch.equal(packed, expected_packed)


def test_a_block_of_zeros_has_another_scale_byte_than_in_modelopt_but_the_same_values() -> None:
    weight = random_blocks(3, 8, 64, torch.float32)
    weight[2, 16:32] = 0
    ours, theirs = quantize_nvfp4_weight(weight), modelopt_quantize(weight)
    assert (ours[1][2, 1].item(), theirs[1][2, 1].item()) == (0, 1)
    assert torch.equal(dequantize_nvfp4(*ours), dequantize_nvfp4(*theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantization_gives_the_same_values_as_modelopt(dtype: torch.dtype) -> None:
    weight = random_blocks(4, 64, 128, torch.float32)
    quantized, scales, global_scale = qtensor.NVFP4QTensor.quantize(weight.clone(), 16)
    expected = quantized.dequantize(
        dtype=torch.float32, scale=scales, double_scale=global_scale, block_sizes=BLOCK_SIZES
    )
    ours = dequantize_nvfp4(quantized._quantized_data, scales, global_scale, dtype=dtype)
    # The same product of three factors, in another order.
    torch.testing.assert_close(ours, expected.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 2**-22, atol=0)


class TestCalibratedLinear:
    def test_the_exported_input_scale_is_ours_for_the_calibrated_maximum(
        self, linear: nn.Linear, calibration: Tensor
    ) -> None:
        exported = quant_utils.get_activation_scaling_factor(linear)
        assert torch.equal(exported.float().squeeze(), input_scale_from_amax(calibration.abs().amax()))

    def test_the_exported_weight_is_ours(self, linear: nn.Linear) -> None:
        packed, scales, weight_scale_2 = quantize_nvfp4_weight(linear.weight.detach())
        exported_scale_2 = quant_utils.get_weight_scaling_factor_2(linear)
        exported_scales = quant_utils.get_weight_scaling_factor(linear)
        exported_weight = quant_utils.to_quantized_weight(
            linear.weight.detach().clone(),
            exported_scales,
            quant_utils.get_quantization_format(linear),
            exported_scale_2,
            block_size=16,
        )
        assert torch.equal(exported_scale_2.squeeze(), weight_scale_2)
        assert torch.equal(exported_scales.view(torch.uint8), scales.view(torch.uint8))
        assert torch.equal(exported_weight, packed)

    def test_products_of_quantized_values_times_alpha_are_modelopts_forward_pass(self, linear: nn.Linear) -> None:
        x = random_blocks(6, 32, 128, torch.float32)
        packed, scales, weight_scale_2 = quantize_nvfp4_weight(linear.weight.detach())
        input_scale = quant_utils.get_activation_scaling_factor(linear).float().squeeze()
        values = fake_quantize_nvfp4(x, input_scale)
        ours = values @ dequantize_nvfp4(packed, scales).t() * (input_scale * weight_scale_2)
        with torch.no_grad():
            torch.testing.assert_close(ours, linear(x), rtol=1e-4, atol=1e-6)
