"""A stand-in of `flashinfer.fused_moe.cutlass_fused_moe` for NVFP4, for tests without a GPU that runs it.

It has the signature of version 0.6.14, refuses with AssertionError what FlashInfer refuses or would read wrongly, and
computes in float64 from nothing but the bytes that it is given. The rules, and the formats, are written down here a
second time, from FlashInfer's binding and kernels, so wrong ones in the provider do not cancel out.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)  # by the low three bits of a code
MIDPOINTS = (E2M1[1:] + E2M1[:-1]) / 2
FROM_ODD_CODE = torch.arange(7) % 2 == 1  # a tie goes to the even code: up from an odd one
SWIGLU = 3  # ActivationType.Swiglu


def install(patch: pytest.MonkeyPatch, cutlass_fused_moe: Callable[..., Any]) -> None:
    """Makes `from flashinfer.fused_moe import cutlass_fused_moe` find this one."""
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.fused_moe")
    module.cutlass_fused_moe = cutlass_fused_moe  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "flashinfer", package)
    patch.setitem(sys.modules, "flashinfer.fused_moe", module)


def cutlass_fused_moe(
    input: Tensor,
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor],
    fc1_expert_biases: Tensor | None = None,
    fc2_expert_biases: Tensor | None = None,
    input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None,
    swiglu_beta: Tensor | None = None,
    swiglu_limit: Tensor | None = None,
    tp_size: int = 1,
    tp_rank: int = 0,
    ep_size: int = 1,
    ep_rank: int = 0,
    cluster_size: int = 1,
    cluster_rank: int = 0,
    output: Tensor | None = None,
    enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False,
    use_packed_weights: bool = False,
    tune_max_num_tokens: int = 8192,
    enable_pdl: bool | None = None,
    activation_type: int = SWIGLU,
    swizzled_input_sf: bool = True,
) -> list[Tensor]:
    # Plain SwiGLU without bias, NVFP4 by NVFP4, experts split by number only.
    assert fc1_expert_biases is fc2_expert_biases is swiglu_alpha is swiglu_beta is swiglu_limit is None
    assert activation_type == SWIGLU
    assert (tp_size, tp_rank, cluster_size, cluster_rank) == (1, 0, 1, 0)
    assert not (enable_alltoall or min_latency_mode or use_packed_weights)
    assert not (use_deepseek_fp8_block_scale or use_w4_group_scaling or use_mxfp8_act_scaling)
    assert 0 <= ep_rank < ep_size

    rows, top_k = token_selected_experts.shape
    experts, hidden, intermediate = *fc2_expert_weights.shape[:2], fc2_expert_weights.shape[2] * 16
    assert rows > 0, "a kernel was launched on zero rows"
    assert tune_max_num_tokens >= rows
    assert hidden % 32 == intermediate % 32 == 0, "TMA needs rows that are multiples of 16 bytes"
    check(input, torch.uint8, (rows, hidden // 2))
    check(token_selected_experts, torch.int32, (rows, top_k))
    check(token_final_scales, torch.float32, (rows, top_k))
    check(fc1_expert_weights, torch.int64, (experts, 2 * intermediate, hidden // 16))
    check(fc2_expert_weights, torch.int64, (experts, hidden, intermediate // 16))
    assert output_dtype == torch.bfloat16 and output is not None
    check(output, output_dtype, (rows, hidden))
    assert input_sf is not None and not swizzled_input_sf, "scales come linear from the gather"
    check(input_sf, torch.uint8, (rows, align(hidden, 64) // 16))

    fc1_act, fc1_block, fc1_alpha, fc2_act, fc2_block, fc2_alpha = quant_scales
    check(fc1_act, torch.float32, ())
    check(fc1_block, torch.int32, (experts, 2 * align(intermediate, 64), align(hidden, 64) // 64))
    check(fc1_alpha, torch.float32, (experts,))
    check(fc2_act, torch.float32, (experts,))
    check(fc2_block, torch.int32, (experts, align(hidden, 128), align(intermediate, 64) // 64))
    check(fc2_alpha, torch.float32, (experts,))
    given = [input, input_sf, token_selected_experts, token_final_scales, *quant_scales]
    assert output.untyped_storage().data_ptr() not in [tensor.untyped_storage().data_ptr() for tensor in given]

    x = decode(input) * spread(e4m3(input_sf)[:, : hidden // 16])  # [S, H]
    result = torch.zeros(rows, hidden, dtype=torch.float64)
    for expert in range(experts):
        row, choice = (token_selected_experts == ep_rank * experts + expert).nonzero(as_tuple=True)
        w13 = dequantize(fc1_expert_weights[expert], fc1_block[expert])
        w2 = dequantize(fc2_expert_weights[expert], fc2_block[expert])
        up, gate = (x[row] @ w13.T * fc1_alpha[expert].double()).chunk(2, dim=1)  # the linear half first
        middle = quantize(gate * torch.sigmoid(gate) * up, fc2_act[expert].double())
        weight = token_final_scales[row, choice].double()
        result.index_add_(0, row, middle @ w2.T * fc2_alpha[expert].double() * weight[:, None])
    output.copy_(result)
    return [output]


def cutlass_fused_moe_0_6_15(*args: Any, use_fused_finalize: bool = True, **kwargs: Any) -> list[Tensor]:
    """From 0.6.15 on the order of the last sum can be asked for."""
    assert not use_fused_finalize, "the fused sum is not deterministic"
    return cutlass_fused_moe(*args, **kwargs)


def check(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
    assert tensor.is_contiguous(), "strides are not looked at"


def align(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def e4m3(scales: Tensor) -> Tensor:
    return scales.view(torch.float8_e4m3fn).double()


def spread(scales: Tensor) -> Tensor:
    """A scale for each value of its block: [N, K/16] to [N, K]."""
    return scales.repeat_interleave(16, dim=1)


def decode(packed: Tensor) -> Tensor:
    """Bytes of two codes each, the first in the low half, to their values: uint8 [N, K/2] to float64 [N, K]."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).long()
    return torch.where(codes >= 8, -E2M1[codes & 7], E2M1[codes & 7])


def dequantize(weights: Tensor, tiles: Tensor) -> Tensor:
    """One expert's weights, int64 [N, K/16], with block scales in tiles, int32, to float64 [N, K]."""
    values = decode(weights.view(torch.uint8))
    scales = e4m3(tiles.view(torch.uint8))
    assert not scales.isnan().any(), "the padding of a tile is multiplied, too"
    offsets = tile_offsets(values.shape[0], values.shape[1] // 16)
    return values * spread(scales.flatten()[offsets])


def tile_offsets(rows: int, columns: int) -> Tensor:
    """Where the scale of each row and block lies: 32 x 4 rows by 4 columns make a tile of 512 bytes."""
    m, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tile = m // 128 * align(columns, 4) // 4 + k // 4
    return tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """To e2m1 * e4m3 of `scale * x`, float64 [N, K]."""
    blocks = x.unflatten(1, (-1, 16)) * scale  # [N, K/16, 16]
    block_scales = (blocks.abs().amax(-1) / 6).clamp(max=448).float().to(torch.float8_e4m3fn).double().unsqueeze(-1)
    magnitudes = torch.where(block_scales > 0, blocks.abs() / block_scales, 0.0).unsqueeze(-1)
    above = (magnitudes > MIDPOINTS) | ((magnitudes == MIDPOINTS) & FROM_ODD_CODE)
    return (E2M1[above.sum(-1)] * blocks.sign() * block_scales).flatten(1)
