"""Inputs of FP8 rows, and what every implementation must do with them, interpreted or on a GPU."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.kernels.torch import fp8_row as torch_rows
from nibble.kernels.torch.fp8_row import Fp8RowLayout, dequantize_fp8_rows
from nibble.kernels.triton import fp8_row as triton_rows

HIDDEN_SIZES = (16, 96, 256, 1040)


def values(seed: int, rows: int, hidden_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of all sizes within a row, from subnormal to near the largest; some rows are alike in size, one is zero."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-140, 120, (rows, hidden_size), generator=generator)
    x = torch.randn(rows, hidden_size, generator=generator)
    x[rows // 2 :] *= 2.0 ** exponents[rows // 2 :]
    x[rows - 1 :] = 0
    return x.to(dtype)


def spoiled(x: Tensor) -> Tensor:
    """With one value that is not finite in each of the first three rows, of at least 16 columns."""
    x = x.clone()
    for row, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        x[row, (row + 1) * 5] = value
    return x


def near_ties() -> Tensor:
    """Every e4m3 number, and the fp32 numbers at and beside the middle of every two: groups of [T, 128] whose scale is
    one, because each has a 448.
    """
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1)])
    x = F.pad(torch.cat([x, -x]), (0, -2 * len(x) % 127)).view(-1, 127)
    return F.pad(x, (0, 1), value=448.0)


def fields(rows: Tensor, hidden_size: int) -> tuple[Tensor, Tensor]:
    """What is told of FP8 rows: the bytes of values that are numbers, and the bits of the scales, one for any NaN."""
    layout = Fp8RowLayout(hidden_size)
    scale_bytes = rows[:, layout.scale_offset : layout.scale_offset + 4 * layout.num_groups]
    scales = scale_bytes.contiguous().view(torch.float32)
    is_number = ~dequantize_fp8_rows(rows, hidden_size).isnan()
    return rows[:, :hidden_size] * is_number, scales.nan_to_num(nan=-1.0)


def assert_same_rows(ours: Tensor, expected: Tensor, hidden_size: int) -> None:
    for name, got, wanted in zip(
        ("values", "scales"), fields(ours, hidden_size), fields(expected, hidden_size), strict=True
    ):
        assert torch.equal(got, wanted), name


def assert_quantizes_like_torch(x: Tensor, device: str) -> None:
    """In memory that begins and ends with other bytes, as peer memory does."""
    rows, hidden_size = x.shape
    row_bytes = Fp8RowLayout(hidden_size).row_bytes
    memory = torch.full((rows + 2, row_bytes), 7, dtype=torch.uint8, device=device)
    out = memory[1:-1]
    apart = F.pad(x, (0, 3)).to(device)[:, :hidden_size]
    assert triton_rows.quantize_fp8_rows(apart, out).data_ptr() == out.data_ptr()
    assert (memory[[0, -1]] == 7).all()
    expected = torch_rows.quantize_fp8_rows(x)
    assert_same_rows(out.cpu(), expected, hidden_size)
    assert_same_rows(triton_rows.quantize_fp8_rows(x.to(device)).cpu(), expected, hidden_size)


def assert_sums_like_torch(terms: Sequence[Tensor], device: str) -> None:
    """In fp32: of sums in bf16 the interpreter cuts off what compiled code rounds."""
    hidden_size = terms[0].shape[1]
    rows = torch.cat([torch_rows.quantize_fp8_rows(term) for term in terms])
    arguments = len(terms), hidden_size, torch.float32
    ours = triton_rows.sum_fp8_rows(rows.to(device), *arguments).cpu()
    assert torch.equal(ours, torch_rows.sum_fp8_rows(rows, *arguments))
