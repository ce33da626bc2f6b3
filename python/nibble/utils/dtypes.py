"""Names of element types, as flags and checkpoints write them."""

import torch

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
}


def torch_dtype(name: str) -> torch.dtype:
    return _DTYPES[name]
