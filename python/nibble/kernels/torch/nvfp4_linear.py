"""An NVFP4 linear layer in torch."""

from torch import Tensor

from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, fake_quantize_nvfp4


class Nvfp4Linear:
    """`fake_quantize(x) @ weight.T * alpha`: `x [T, K]`, `alpha` fp32 [N], result fp32 [T, N].

    The products e2m1 * e4m3 are exact in fp32, the sum is fp32, and the tensor-wide scales in `alpha` come last.
    """

    def __init__(self, values: Tensor, scales: Tensor, input_scale: Tensor, alpha: Tensor) -> None:
        """`values` uint8 [N, K/2] and `scales` e4m3 [N, K/16] as in the checkpoint, `input_scale` fp32 scalar."""
        self.weight = dequantize_nvfp4(values, scales)
        self.input_scale, self.alpha = input_scale, alpha

    def __call__(self, x: Tensor) -> Tensor:
        return (fake_quantize_nvfp4(x, self.input_scale) @ self.weight.t()).mul_(self.alpha)
