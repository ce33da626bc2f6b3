"""Quantizes the BF16 checkpoint to NVFP4 with NVIDIA's ModelOpt (nvidia-modelopt), on a CPU.

python -m tools.demo_model.export --checkpoint build/nibble-demo-6m-bf16 --output assets/nibble-demo-6m-nvfp4

The architecture is the checkpoint's own.
"""

import argparse
import itertools
import shutil
from pathlib import Path

import modelopt.torch.quantization as mtq  # type: ignore[import-untyped]
import torch
from modelopt.torch.export import export_hf_checkpoint  # type: ignore[import-untyped]
from modelopt.torch.quantization import tensor_quant  # type: ignore[import-untyped]
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from .data import training_conversations
from .families import family_of
from .nvfp4 import BLOCK_SIZE, round_to_nvfp4
from .tokenizer import MAX_LENGTH, TOKENIZER_FILES

CALIBRATION_CONVERSATIONS = 256


def _round_on_cpu(
    inputs: torch.Tensor,
    block_size: int,
    amax: torch.Tensor,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> torch.Tensor:
    """ModelOpt's dynamic block quantization, which it has for CUDA only, for the one format used here."""
    assert (block_size, num_bits, exponent_bits, scale_num_bits, scale_exponent_bits) == (BLOCK_SIZE, 4, 2, 8, 4)
    return round_to_nvfp4(inputs, amax.amax())


def quantize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Calibrates on training conversations and makes `model` a quantized one, in place."""

    def calibrate(model: PreTrainedModel) -> None:
        conversations = itertools.islice(training_conversations("calibration"), CALIBRATION_CONVERSATIONS)
        for conversation in conversations:
            tokens = tokenizer.apply_chat_template(list(conversation.messages), return_dict=False, return_tensors="pt")
            model(tokens[:, :MAX_LENGTH])

    tensor_quant.dynamic_block_quantize_op = _round_on_cpu
    with torch.inference_mode():
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, calibrate)


def check_export(directory: Path, max_bytes: int) -> None:
    """Raises ValueError when the folder is too large, or a scale is missing, not finite or not positive."""
    files = [path for path in directory.iterdir() if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    if size > max_bytes:
        raise ValueError(f"{directory} takes {size} bytes, more than {max_bytes}")
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
        packed = {name for name in names if tensors.get_slice(name).get_dtype() == "U8"}
        for name in packed:
            for suffix in ("_scale", "_scale_2"):
                _check_scale(name + suffix, tensors.get_tensor(name + suffix))
            name = name.removesuffix("weight") + "input_scale"
            _check_scale(name, tensors.get_tensor(name))
    print(f"{directory}: {size} bytes, {len(packed)} quantized matrices, {len(names)} tensors")


def _check_scale(name: str, scale: torch.Tensor) -> None:
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()) or not bool((scale >= 0).all()) or not bool(scale.max() > 0):
        raise ValueError(f"{name} is not a finite positive scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the BF16 checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, replaced when it exists")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint,
        dtype=torch.bfloat16,
        experts_implementation="eager",  # the one that ModelOpt can observe
    )
    quantize(model, tokenizer)
    if args.output.exists():
        shutil.rmtree(args.output)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=args.output)
    for name in TOKENIZER_FILES:
        shutil.copyfile(args.checkpoint / name, args.output / name)
    (args.output / "model.safetensors").chmod(0o644)
    check_export(args.output, family_of(model.config).max_bytes)


if __name__ == "__main__":
    main()
