"""When activations are quantized to FP4 before they are gathered."""

from dataclasses import dataclass

from nibble.config.model_config import ModelConfig
from nibble.config.quantization_config import QuantizationConfig
from nibble.config.server_args import ServerArgs


@dataclass(frozen=True)
class Fp4AllGatherDecision:
    """`reason` names the condition that failed, or says that all hold."""

    enabled: bool
    reason: str


def should_use_flashinfer_cutlass_moe_fp4_allgather(
    args: ServerArgs, model: ModelConfig, quantization: QuantizationConfig | None
) -> Fp4AllGatherDecision:
    """Decided once, at start, from the flags and the checkpoint; every rank comes to the same answer."""
    method = quantization.method if quantization else None
    conditions = [
        (model.moe is not None, f"{model.architecture} has no experts"),
        (args.enable_flashinfer_cutlass_moe, "--enable-flashinfer-cutlass-moe is absent"),
        (args.enable_dp_attention, "--enable-dp-attention is absent"),
        (method == "modelopt_fp4", f"the checkpoint's quantization is {method}, not modelopt_fp4"),
        (args.dp_size == args.ep_size, f"dp-size {args.dp_size} differs from ep-size {args.ep_size}"),
        (args.dp_size == args.tp_size, f"dp-size and ep-size {args.dp_size} are smaller than tp-size {args.tp_size}"),
        (
            not args.disable_flashinfer_cutlass_moe_fp4_allgather,
            "--disable-flashinfer-cutlass-moe-fp4-allgather is set",
        ),
    ]
    for holds, failure in conditions:
        if not holds:
            return Fp4AllGatherDecision(False, failure)
    return Fp4AllGatherDecision(True, f"modelopt_fp4 with dp = ep = {args.dp_size}")
