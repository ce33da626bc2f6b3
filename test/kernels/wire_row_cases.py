"""Inputs and comparisons for the Triton twins of the wire row, interpreted on a CPU or compiled on a GPU.

The torch twins on the CPU are the reference; test_nvfp4.py and test_wire_row.py check those.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nibble.kernels.torch import wire_row as reference
from nibble.kernels.torch.nvfp4 import BLOCK_SIZE, input_scale_from_amax, swizzle_scales
from nibble.kernels.torch.wire_row import UnpackedRows, WireRowLayout
from nibble.kernels.triton import wire_row

ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]

ORDINARY_SCALES = [1.0, 2.0**-12, 0.37, 3e-5, 1e4]
# Subnormal, below and above what multiplying by a reciprocal is used for, and so large that products overflow.
EXTREME_SCALES = [2.0**-149, 3e-39, 2.0**-101, 2.0**101, 1e36, 5e37]
# With each of these as divisor `d` there are a bf16 `x` and a tie of e2m1 between which x / d and x * (1 / d) disagree.
# Scales that were calibrated, a bf16 maximum over 2688, are often so. For the last two no reciprocal gives all codes.
SCALES_WITH_INEXACT_RECIPROCAL = [
    *(float.fromhex(mantissa) for mantissa in ("0x1.04cccc", "0x1.055556", "0x1.0c924a", "0x1.1b6db8", "0x1.333332")),
    *(amax / 2688 for amax in (6.0, 7.25, 140.0)),
    1.875,
]

Rows = tuple[Tensor, Tensor, Tensor]


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """What is allocated holds 0xFF or NaN until it is written, so that a byte that a kernel leaves out shows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def with_routing(x: Tensor, top_k: int = 2) -> Rows:
    generator = torch.Generator().manual_seed(x.shape[0])
    topk_ids = torch.randint(-1, 1000, (x.shape[0], top_k), dtype=torch.int32, generator=generator)
    return x, topk_ids, torch.randn(x.shape[0], top_k, generator=generator)


def random_rows(seed: int, rows: int, layout: WireRowLayout, dtype: torch.dtype = torch.bfloat16) -> Rows:
    """Normal values whose blocks differ in size by factors of e^3."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(rows, layout.hidden_size // BLOCK_SIZE, BLOCK_SIZE, generator=generator)
    sizes = torch.randn(*blocks.shape[:2], 1, generator=generator).mul_(3).exp_()
    return with_routing((blocks * sizes).view(rows, layout.hidden_size).to(dtype), layout.top_k)


def every_bf16_value(largest: float, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[64, 16384]: a block for each bf16 value, which also holds `largest`."""
    x = torch.zeros(65536, BLOCK_SIZE, dtype=dtype)
    x[:, 3] = ALL_BF16
    x[:, 8] = ALL_BF16
    x[:, 14] = largest
    return x.view(64, -1)


def near_ties(input_scale: float) -> Tensor:
    """[7, 160]: for ten block scales the bf16 values around their product with `input_scale` and a tie of e2m1."""
    blocks = []
    for tie in E2M1_TIES:
        for block_scale in (0.5, *(1 + eighths / 8 for eighths in range(8)), 2.0):
            nearest = torch.tensor(tie * block_scale * input_scale).bfloat16().view(torch.int16)
            values = torch.arange(-7, 8, dtype=torch.int16).add(nearest).view(torch.bfloat16)
            largest = torch.tensor([6 * block_scale * input_scale]).bfloat16()
            blocks.append(torch.cat([largest, values * (-1.0) ** torch.arange(15)]).bfloat16())
    return torch.stack(blocks).view(len(E2M1_TIES), -1)


def assert_packs_like_torch(rows: Rows, input_scale: float | Tensor, device: str = "cpu") -> None:
    scale = torch.as_tensor(input_scale, dtype=torch.float32)
    expected = reference.quantize_pack(*rows, scale)
    got = wire_row.quantize_pack(*(tensor.to(device) for tensor in rows), scale.to(device))
    assert (got.shape, got.dtype) == (expected.shape, torch.uint8)
    different = (got.cpu() != expected).any(dim=1).nonzero().flatten()
    assert not len(different), f"rows {different[:5].tolist()} of {len(expected)} differ, input_scale {scale.item()!r}"


def typical_scale(x: Tensor) -> Tensor:
    return input_scale_from_amax(x.abs().amax() / 3)


def assert_unpacks_like_torch(rows: Tensor, layout: WireRowLayout, swizzled: bool, device: str = "cpu") -> None:
    expected = reference.unpack(rows, layout)
    x_scale = expected.x_scale.contiguous()
    expected_scale = swizzle_scales(x_scale) if swizzled else x_scale
    got: UnpackedRows = wire_row.unpack(rows.to(device), layout, swizzled=swizzled)
    for name in ("x_fp4", "x_scale", "topk_ids", "topk_weights"):
        field, wanted = getattr(got, name), expected_scale if name == "x_scale" else getattr(expected, name)
        assert field.is_contiguous()
        assert (name, field.dtype, field.shape) == (name, wanted.dtype, wanted.shape)
        assert torch.equal(field.cpu().view(torch.uint8), wanted.contiguous().view(torch.uint8)), name
