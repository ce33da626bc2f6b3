"""The Triton twin of the NVFP4 linear layer, compiled, agrees with the torch twin."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fused_moe_cases as cases
from graph_cases import assert_replays_what_inputs_hold
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, quantize_nvfp4_weight
from nibble.kernels.torch.nvfp4_linear import Nvfp4Linear as TorchLinear
from nibble.kernels.triton.nvfp4_linear import Nvfp4Linear
from wire_row_cases import poisoned_allocations

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poisoned_allocations():
        yield


def linear_layer(seed: int, rows: int, columns: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    values, scales, scale_2 = quantize_nvfp4_weight(torch.randn(rows, columns, generator=generator))
    alpha = cases.INPUT_SCALE * scale_2 * (torch.rand(rows, generator=generator) + 0.5)
    return tuple(tensor.cuda() for tensor in (values, scales, cases.INPUT_SCALE, alpha))


def random_x(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


@pytest.mark.parametrize(("rows", "columns"), [(40, 16), (1000, 528), (2112, 7168), (7168, 2048), (40000, 128)])
def test_any_number_of_rows_gives_what_torch_gives(rows: int, columns: int) -> None:
    weights = linear_layer(0, rows, columns)
    linear, reference = Nvfp4Linear(*weights, dtype=torch.float32), TorchLinear(*weights)
    for x_rows in (1, 3, 30, 64, 100, 1000):
        x = random_x(x_rows, x_rows, columns)
        torch.testing.assert_close(linear(x), reference(x), rtol=1e-4, atol=1e-4 * columns**0.5)


def test_every_code_with_every_scale_is_unpacked_exactly() -> None:
    values = torch.arange(256).to(torch.uint8).repeat(127, 1)  # [127, 256], a row for every finite scale
    scales = torch.arange(127).to(torch.uint8)[:, None].repeat(1, 32).view(torch.float8_e4m3fn)
    one = torch.ones(127, device="cuda")
    linear = Nvfp4Linear(values.cuda(), scales.cuda(), one[0], one, dtype=torch.float32)
    out = linear(torch.eye(512, device="cuda") * 6)  # quantized to themselves
    assert torch.equal(out.t().cpu(), dequantize_nvfp4(values, scales) * 6)


def test_a_captured_graph_computes_what_its_inputs_hold_when_it_is_replayed() -> None:
    linear, x = Nvfp4Linear(*linear_layer(1, 300, 512)), random_x(1, 20, 512)
    assert_replays_what_inputs_hold(lambda: linear(x), [x], [[random_x(seed, 20, 512)] for seed in (2, 3)])
