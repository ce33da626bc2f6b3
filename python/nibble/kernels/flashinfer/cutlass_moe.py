"""The routed NVFP4 experts of one rank on GPUs with FP4 tensor cores (compute capability 10.0 and later).

FlashInfer's `fused_moe.cutlass_fused_moe` (0.6.14 or newer) does the W4A4 arithmetic of
`nibble.kernels.torch.fused_moe.fused_moe_nvfp4`, but rounds the results of both matrix products to bf16. What it
takes, by its sources (`fused_moe/core.py`, `csrc/fused_moe/cutlass_backend/`):

- Up before gate. SwiGLU's linear half comes first, in the values and in the block scales.
- Weights as int64 [E, N, K/16], and their block scales in 128x4 tiles as int32 [E, ceil(N/128) * 128, K/64].
- Block scales of the rows linear, with `swizzled_input_sf=False`; it then assumes as many in a row as whole tiles
  have. So H and I are padded to multiples of 64, gate and up each on its own.
- Six `quant_scales`. For an expert with alphas g1 and g2 they are, in this order: the quantizer's scale of the rows
  (only read where rows come unquantized, but one value per expert would be refused), block scales, g1 [E], the
  quantizer's scale of the intermediate [E], block scales, g2 [E].
- Neither strides nor zero rows: it reads from the data pointers on.
- Expert ids are global; those outside of `ep_rank`'s share of the experts are skipped.

**Gate and up with different scales.** There is one g1 per expert for both. Gate passes through SiLU, so g1 is that of
gate. Up is only multiplied, so `up = ratio * up'` with `ratio = g1_up / g1_gate`, and quantizing `ratio * h'` with
`1 / w2_input_scale` is quantizing `h'` with `ratio / w2_input_scale`: that is the intermediate's scale here. Exact but
for the rounding of fp32, for any ratio.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from nibble.kernels.torch.fused_moe import PackedNvfp4Experts
from nibble.kernels.torch.nvfp4 import BLOCK_SIZE, swizzle_scales
from nibble.kernels.triton.fp8_row import leave_result

_SIZE_UNIT = 4 * BLOCK_SIZE  # values whose scales fill the width of a tile
_TUNED_ROWS = 8192  # FlashInfer's default


class CutlassNvfp4MoE:
    """The experts `first_expert`, … of a layer, in FlashInfer's layout.

    `num_experts` is the number of experts of the whole layer, by default of this rank. Raises ValueError where the
    ranks' shares of them are not equal.
    """

    def __init__(self, packed: PackedNvfp4Experts, first_expert: int, num_experts: int | None = None) -> None:
        from flashinfer.fused_moe import cutlass_fused_moe  # type: ignore[import-not-found]

        self.fused_moe = cutlass_fused_moe
        num_local, self.hidden_size, half_intermediate = packed.w2.shape
        num_experts = num_experts or num_local
        if num_experts % num_local or first_expert % num_local:
            raise ValueError(
                f"the CUTLASS kernels need equal shares of the experts on all ranks, got {num_local} of {num_experts} "
                f"from {first_expert} on"
            )
        self.ep_size, self.ep_rank = num_experts // num_local, first_expert // num_local
        self.padded_hidden = hidden = _round_up(self.hidden_size)
        intermediate = _round_up(2 * half_intermediate)

        self.w13 = _up_before_gate(packed.w13, intermediate, hidden // 2).view(torch.int64)  # [E, 2I, H/16]
        self.w2 = _pad(packed.w2, hidden, intermediate // 2).view(torch.int64)  # [E, H, I/16]
        w13_scales = _up_before_gate(packed.w13_scales.view(torch.uint8), intermediate, hidden // BLOCK_SIZE)
        w2_scales = _pad(packed.w2_scales.view(torch.uint8), hidden, intermediate // BLOCK_SIZE)
        g1_gate, g1_up = packed.g1_gate_up.unbind(1)
        # A gate of zeros gives zeros, whatever up is.
        up_to_gate = torch.where(g1_gate > 0, g1_up / g1_gate, 1.0)
        self.quant_scales = [
            torch.ones_like(packed.g2[0]),
            _swizzle_stack(w13_scales),  # int32 [E, 2I, H/64]
            g1_gate.contiguous(),
            up_to_gate / packed.w2_input_scale,
            _swizzle_stack(w2_scales),  # int32 [E, ceil(H/128) * 128, I/64]
            packed.g2.contiguous(),
        ]
        # Fused, the sum over experts is one of atomics, in no fixed order. 0.6.14 cannot be told, but fuses only in
        # configurations that its tuner may choose, and nothing is tuned here.
        parameters = inspect.signature(cutlass_fused_moe).parameters
        self.options = {"use_fused_finalize": False} if "use_fused_finalize" in parameters else {}

    def __call__(
        self, x_fp4: Tensor, x_scale: Tensor, topk_ids: Tensor, topk_weights: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The contract of `fused_moe_nvfp4`, with bf16 [S, H] as result; no rows launch nothing.

        `x_fp4` [S, H/2], `x_scale` [S, H/16], `topk_ids` and `topk_weights` [S, K] may be views of wire rows; what
        is not contiguous is copied. FP8 rows, a uint8 `out`, get the bytes of `quantize_fp8_rows` of the result.
        """
        rows = x_fp4.shape[0]
        result = x_fp4.new_empty(rows, self.padded_hidden, dtype=torch.bfloat16)
        if rows > 0:
            self.fused_moe(
                input=_pad(x_fp4, rows, self.padded_hidden // 2),
                token_selected_experts=topk_ids.contiguous(),
                token_final_scales=topk_weights.contiguous(),
                fc1_expert_weights=self.w13,
                fc2_expert_weights=self.w2,
                output_dtype=torch.bfloat16,
                quant_scales=self.quant_scales,
                input_sf=_pad(x_scale.view(torch.uint8), rows, self.padded_hidden // BLOCK_SIZE),
                swizzled_input_sf=False,
                ep_size=self.ep_size,
                ep_rank=self.ep_rank,
                output=result,
                tune_max_num_tokens=max(_TUNED_ROWS, 1 << (rows - 1).bit_length()),
                **self.options,
            )
        result = result[:, : self.hidden_size]
        return result.contiguous() if out is None else leave_result(result, out)


def _round_up(size: int) -> int:
    return -(-size // _SIZE_UNIT) * _SIZE_UNIT


def _pad(x: Tensor, rows: int, columns: int) -> Tensor:
    """`x` [..., r, c], contiguous, with zeros below and to the right: [..., rows, columns]."""
    if x.shape[-2:] == (rows, columns):
        return x.contiguous()
    return F.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]))


def _up_before_gate(stack: Tensor, rows: int, columns: int) -> Tensor:
    """[E, 2I, C] with gate first to [E, 2 * rows, columns] with up first, each padded."""
    gate, up = stack.chunk(2, dim=1)
    return torch.cat([_pad(up, rows, columns), _pad(gate, rows, columns)], dim=1)


def _swizzle_stack(scales: Tensor) -> Tensor:
    """Linear block scales, uint8 [E, N, K/16], to tiles of each expert, int32 [E, ceil(N/128) * 128, K/64]."""
    return torch.stack([swizzle_scales(of_expert) for of_expert in scales]).view(torch.int32)
