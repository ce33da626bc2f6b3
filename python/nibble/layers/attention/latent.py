"""The projection of MLA from latent vectors to keys and values, absorbed into what stands before and behind attention.

With a head's rows of `kv_b_proj` split into K [D, R] and V [V, R], token t with latent vector c_t has the key K c_t and
the value V c_t. Products with a query q are `q . K c_t = K^T q . c_t`, and sums of values `V (sum of w_t c_t)`: so
attention needs latent vectors only (DeepSeek-V2, arXiv:2405.04434, 2.1.2).
"""

import torch

from nibble.config.resolve import EngineConfig
from nibble.kernels.torch.nvfp4 import dequantize_nvfp4, fake_quantize_nvfp4
from nibble.layers.quantization.modelopt_quant import Nvfp4Weight
from nibble.layers.weights import Shard, WeightTarget, float_target
from nibble.utils.dtypes import torch_dtype


class AbsorbedKvProjection:
    """`kv_b_proj` [N * (D + V), R], or the rows of some of the heads.

    Quantized to NVFP4 it was calibrated for input that is quantized, too (W4A4). Latent vectors are that input, so they
    are quantized once, before they are cached, without `input_scale`: e2m1 times e4m3, which BF16 holds exactly. The
    scales are in the absorbed weights.
    """

    def __init__(self, config: EngineConfig, prefix: str, rows: Shard) -> None:
        mla = config.model.mla
        assert mla is not None
        self.key_size, self.head_size = mla.qk_nope_head_dim, mla.qk_nope_head_dim + mla.v_head_dim
        self.dtype, self.rows = torch_dtype(config.dtype), rows
        self.weight: Nvfp4Weight | torch.Tensor
        self.input_scale: torch.Tensor | None = None
        if config.quantization is not None and config.quantization.is_quantized(f"{prefix}.kv_b_proj"):
            self.weight = Nvfp4Weight(rows, Shard.whole(mla.kv_lora_rank))
            self.input_scale = self.weight.input_scale
        else:
            self.weight = torch.empty(rows.size, mla.kv_lora_rank, dtype=self.dtype)

    def process_weights_after_loading(self) -> None:
        weight = self.weight
        if isinstance(weight, Nvfp4Weight):
            weight = dequantize_nvfp4(weight.values, weight.scales, weight.scale_2 * weight.input_scale, self.dtype)
        heads = weight.unflatten(0, (-1, self.head_size))  # [N, D + V, R]
        self.keys = heads[:, : self.key_size].contiguous()  # [N, D, R]
        self.values = heads[:, self.key_size :].mT.contiguous()  # [N, R, V]
        del self.weight

    def quantized(self, latent: torch.Tensor) -> torch.Tensor:
        """Latent vectors `[T, R]` as they are cached."""
        if self.input_scale is None:
            return latent
        return fake_quantize_nvfp4(latent, self.input_scale).to(self.dtype)

    def absorb(self, q: torch.Tensor) -> torch.Tensor:
        """Queries `[T, N, D]` for keys to `[T, N, R]` for latent vectors."""
        return torch.bmm(q.transpose(0, 1), self.keys).transpose(0, 1)

    def expand(self, attended: torch.Tensor) -> torch.Tensor:
        """Sums of latent vectors `[T, N, R]` to sums of values `[T, N * V]`."""
        return torch.bmm(attended.transpose(0, 1), self.values).transpose(0, 1).flatten(1)

    def weight_targets(self, prefix: str) -> dict[str, WeightTarget | None]:
        targets: dict[str, WeightTarget | None] = {}
        if isinstance(self.weight, Nvfp4Weight):
            targets.update(self.weight.weight_targets(f"{prefix}.kv_b_proj"))
        else:
            targets[f"{prefix}.kv_b_proj.weight"] = float_target(self.weight, shards=[self.rows])
        # Exports with an FP8 cache scale the keys and values of heads, which are never made here.
        return targets | {f"{prefix}.k_proj.k_scale": None, f"{prefix}.v_proj.v_scale": None}
