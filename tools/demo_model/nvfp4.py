"""NVFP4 in plain PyTorch: rounding to it for training and calibration, and reading it back.

A value is e2m1 · block scale (e4m3, one for 16 values along the last axis) · tensor scale (fp32), as in
NVIDIA's TensorRT Model Optimizer: tensor scale = amax / (6 · 448), block scale = block amax / 6.
"""

import torch

BLOCK_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1 value, ties to the even mantissa, saturating at 6. Any shape, fp32."""
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    return torch.copysign(rounded.clamp(max=E2M1_MAX), x)


def round_to_nvfp4(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """`x` [..., K] as NVFP4 holds it, in the dtype of `x`; K is a multiple of 16, `amax` the tensor's largest
    magnitude (fp32 scalar). A block that rounds to scale zero becomes zeros."""
    blocks = x.float().reshape(*x.shape[:-1], -1, BLOCK_SIZE)
    tensor_scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    block_scale = blocks.abs().amax(dim=-1, keepdim=True) / (E2M1_MAX * tensor_scale)
    block_scale = block_scale.nan_to_num(0.0).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    scale = block_scale * tensor_scale
    rounded = round_to_e2m1(blocks / torch.where(scale > 0, scale, 1.0)) * scale
    return rounded.view(x.shape).to(x.dtype)


def dequantize(packed: torch.Tensor, block_scale: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
    """w = e2m1 · scale · scale_2, in fp32.

    `packed` uint8 [N, K/2] holds two values a byte, the even column in the low nibble; `block_scale` e4m3
    [N, K/16]; `tensor_scale` fp32 scalar. Returns [N, K].
    """
    rows, blocks = block_scale.shape
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).int()  # [N, K/2, 2]
    values = torch.tensor(E2M1_VALUES)[codes].view(rows, blocks, BLOCK_SIZE)
    scale = block_scale.float() * tensor_scale.float()
    return (values * scale.unsqueeze(-1)).view(rows, blocks * BLOCK_SIZE)
