"""Turns an NVFP4 checkpoint of ModelOpt back into a BF16 one that transformers loads.

python -m tools.demo_model.dequantize --output build/nibble-demo-6m-dequantized

Weights become e2m1 · scale · scale_2, rounded to BF16; what was not quantized is copied, scales of activations
are left out. The result computes as fast as the BF16 original and answers nearly as it does.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .nvfp4 import dequantize
from .tokenizer import TOKENIZER_FILES

QUANTIZED = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"


def dequantize_tensors(quantized: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an NVFP4 checkpoint as those of a BF16 one, by the names that they have there."""
    tensors = {}
    for name, tensor in quantized.items():
        if name.endswith((".weight_scale", ".weight_scale_2", ".input_scale")):
            continue
        if tensor.dtype == torch.uint8:
            tensor = dequantize(tensor, quantized[f"{name}_scale"], quantized[f"{name}_scale_2"]).to(torch.bfloat16)
        tensors[name] = tensor
    return tensors


def dequantize_checkpoint(checkpoint: Path, output: Path) -> None:
    """Writes the NVFP4 checkpoint in `checkpoint` as a BF16 one into the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = dequantize_tensors(load_file(checkpoint / "model.safetensors"))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("generation_config.json", *TOKENIZER_FILES):
        shutil.copyfile(checkpoint / name, output / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=QUANTIZED, help="folder of the NVFP4 checkpoint")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    dequantize_checkpoint(args.checkpoint, args.output)


if __name__ == "__main__":
    main()
