"""Inputs and comparisons for the Triton twins of the NVFP4 experts and linear layer, interpreted or compiled."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fp8_row_cases
from nibble.kernels.select import Experts
from nibble.kernels.torch.fp8_row import Fp8RowLayout, quantize_fp8_rows
from nibble.kernels.torch.fused_moe import Nvfp4MoE as TorchMoE
from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, fake_quantize_nvfp4, quantize_nvfp4, quantize_nvfp4_weight
from nibble.kernels.triton import fused_moe
from nibble.kernels.triton.nvfp4_tiles import Tiling

INPUT_SCALE = torch.tensor(4.0 / 2688)
TILINGS = [
    Tiling(16, 16, 64, 256, 4, 4),
    Tiling(16, 16, 64, 128, 4, 6, programs_per_multiprocessor=200),
    Tiling(32, 16, 128, 128, 4, 3, max_registers=128),
    Tiling(64, 64, 64, 128, 4, 3),
    Tiling(128, 32, 128, 128, 8, 3),
]


@dataclass(frozen=True, eq=False)
class Batch:
    """What a rank gets of a gather, in the order of the arguments."""

    x_fp4: Tensor  # uint8 [S, H/2]
    x_scale: Tensor  # e4m3 [S, H/16]
    topk_ids: Tensor  # int32 [S, K]
    topk_weights: Tensor  # fp32 [S, K]

    def to(self, device: str) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self.arguments))

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x_fp4, self.x_scale, self.topk_ids, self.topk_weights


def random_experts(seed: int, experts: int, hidden: int, intermediate: int) -> PackedNvfp4Experts:
    """Experts whose gate and up have different scales, and whose intermediate values fill the range of theirs."""
    generator = torch.Generator().manual_seed(seed)

    def weights(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        matrices = torch.randn(experts, rows, columns, generator=generator) / columns**0.5
        quantized = [quantize_nvfp4_weight(matrix)[:2] for matrix in matrices]
        return torch.stack([values for values, _ in quantized]), torch.stack([scales for _, scales in quantized])

    w13, w13_scales = weights(2 * intermediate, hidden)
    w2, w2_scales = weights(hidden, intermediate)
    sizes = torch.rand(experts, 4, generator=generator) + 0.5
    return PackedNvfp4Experts(
        w13=w13,
        w13_scales=w13_scales,
        w2=w2,
        w2_scales=w2_scales,
        g1_gate_up=INPUT_SCALE / 700 * sizes[:, :2] / hidden**0.5 * torch.tensor([3.0, 8.0]),
        w2_input_scale=sizes[:, 2] / 1000,
        g2=sizes[:, 3] / 2688,
    )


def slice_experts(packed: PackedNvfp4Experts, start: int, end: int) -> PackedNvfp4Experts:
    return PackedNvfp4Experts(*(getattr(packed, field.name)[start:end] for field in fields(packed)))


def experts_to(packed: PackedNvfp4Experts, device: str) -> PackedNvfp4Experts:
    return PackedNvfp4Experts(*(getattr(packed, field.name).to(device) for field in fields(packed)))


def random_batch(seed: int, rows: int, hidden: int, top_k: int, first_id: int, end_id: int) -> Batch:
    """Rows that each take `top_k` different ids from `first_id` to `end_id`, some ids much more often than others."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(rows, hidden, generator=generator)
    favour = torch.randn(end_id - first_id, generator=generator) * 2
    scores = torch.randn(rows, end_id - first_id, generator=generator) + favour
    topk_ids = scores.topk(top_k).indices.int() + first_id
    return Batch(*quantize_nvfp4(x, INPUT_SCALE), topk_ids, torch.rand(rows, top_k, generator=generator))


def float64_reference(packed: PackedNvfp4Experts, batch: Batch, first_expert: int) -> Tensor:
    """One row and one expert at a time."""
    x = dequantize_nvfp4(batch.x_fp4, batch.x_scale).double()
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row, (ids, weights) in enumerate(zip(batch.topk_ids.tolist(), batch.topk_weights.tolist(), strict=True)):
        for expert, weight in zip([i - first_expert for i in ids], weights, strict=True):
            if 0 <= expert < len(packed.w13):
                w13, w2 = (
                    dequantize_nvfp4(values[expert], scales[expert]).double()
                    for values, scales in ((packed.w13, packed.w13_scales), (packed.w2, packed.w2_scales))
                )
                gate, up = (w13 @ x[row]).view(2, -1) * packed.g1_gate_up[expert].double()[:, None]
                hidden = (F.silu(gate) * up).float().unsqueeze(0)
                down = w2 @ fake_quantize_nvfp4(hidden, packed.w2_input_scale[expert])[0].double()
                out[row] += down * packed.g2[expert].double() * weight
    return out


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal but for rounding; a few values of the second quantization may get the code beside the right one."""
    got, expected = got.cpu(), expected.cpu()
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs()
    size = expected.double().norm()
    assert error.norm() <= 0.02 * size
    rounding = torch.finfo(got.dtype).eps
    assert error.median() <= (4 * rounding if rounding > 1e-4 else 1e-5) * size / expected.numel() ** 0.5


def assert_like_torch(
    packed: PackedNvfp4Experts,
    batch: Batch,
    first_expert: int = 0,
    device: str = "cpu",
    num_experts: int | None = None,
) -> None:
    expected = TorchMoE(packed, first_expert)(*batch.arguments)
    moe = fused_moe.Nvfp4MoE(experts_to(packed, device), first_expert, num_experts, dtype=torch.float32)
    got = moe(*batch.to(device).arguments)
    assert got.dtype == torch.float32
    assert_close(got, expected)
    nobodys = ((batch.topk_ids < first_expert) | (batch.topk_ids >= first_expert + len(packed.w13))).all(dim=1)
    assert not got.cpu()[nobodys].any()


def use_tiling(patch: pytest.MonkeyPatch, tiling: Tiling) -> None:
    patch.setattr(fused_moe, "choose_tilings", lambda pairs_per_expert: (tiling, tiling))
    patch.setattr(fused_moe, "_SPLIT_COLUMNS", 128)


def record_splits(patch: pytest.MonkeyPatch) -> list[int]:
    """In how many parts the columns of gate and up are cut from now on, where they are."""
    splits: list[int] = []
    kernel = fused_moe._sum_splits_kernel

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*arguments: Any, **options: Any) -> None:
                splits.append(options["SPLITS"])
                kernel[grid](*arguments, **options)

            return launch

    patch.setattr(fused_moe, "_sum_splits_kernel", Recorder())
    return splits


def assert_leaves_result_where_told(moe: Experts, batch: Batch, hidden: int) -> None:
    """In memory that begins and ends with other bytes, as peer memory does."""
    rows = len(batch.topk_ids)
    memory = torch.full((rows + 2, hidden), 7.0, dtype=torch.bfloat16, device=batch.x_fp4.device)
    out = memory[1:-1]
    assert moe(*batch.arguments, out).data_ptr() == out.data_ptr()
    assert torch.equal(out, moe(*batch.arguments, None).bfloat16())
    assert (memory[[0, -1]] == 7).all()


def assert_leaves_fp8_rows_where_told(moe: Experts, batch: Batch, hidden: int) -> None:
    """Those of the result that it would have returned."""
    memory = torch.full((len(batch.topk_ids) + 2, Fp8RowLayout(hidden).row_bytes), 7, dtype=torch.uint8)
    memory = memory.to(batch.x_fp4.device)
    out = memory[1:-1]
    assert moe(*batch.arguments, out).data_ptr() == out.data_ptr()
    expected = quantize_fp8_rows(moe(*batch.arguments, None).cpu())
    fp8_row_cases.assert_same_rows(out.cpu(), expected, hidden)
    assert (memory[[0, -1]] == 7).all()
