"""The C library as Python functions on raw addresses, of tensors that outlive the call; the sources say what each
takes.
"""

import ctypes
import functools

import torch
from torch import Tensor

from nibble.config.resolve import CPU_KERNELS
from nibble.utils.c_library import build_c_library

_INT, _FLOAT, _ADDRESS = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "initialize": [],
    "quantize_rows": [_ADDRESS, _INT, _INT, _FLOAT, _ADDRESS, _ADDRESS],
    "quantize_pack": [_ADDRESS] * 3 + [_INT] * 3 + [_FLOAT] + [_INT] * 4 + [_ADDRESS],
    "linear_nvfp4": [_ADDRESS] + [_INT] * 2 + [_FLOAT] + [_ADDRESS] * 3 + [_INT, _ADDRESS],
    "fused_moe_nvfp4": [_ADDRESS, _INT] * 4 + [_INT] * 6 + [_ADDRESS] * 8,
    "rms_norm": [_ADDRESS] + [_INT] * 3 + [_ADDRESS, _FLOAT, _ADDRESS],
    "add_rms_norm": [_ADDRESS] * 2 + [_INT] * 2 + [_ADDRESS, _FLOAT] + [_ADDRESS] * 2,
    "qk_norm_rope": [_ADDRESS] * 2 + [_INT] * 5 + [_ADDRESS] * 2 + [_FLOAT] + [_ADDRESS] * 5,
    "store_kv": [_ADDRESS, _INT, _ADDRESS] + [_INT] * 3 + [_ADDRESS] * 3 + [_INT],
    "decode_attention": [_ADDRESS] * 4 + [_INT, _ADDRESS] + [_INT] * 5 + [_FLOAT] + [_INT] * 2 + [_ADDRESS],
    "linear": [_ADDRESS] + [_INT] * 2 + [_ADDRESS, _INT, _ADDRESS],
    "argmax": [_ADDRESS] + [_INT] * 2 + [_ADDRESS],
    "topk_softmax": [_ADDRESS] + [_INT] * 3 + [ctypes.c_int] + [_ADDRESS] * 2,
}


@functools.cache
def c_kernels() -> ctypes.CDLL:
    """Compiled when first asked for. Raises CompileError."""
    library = ctypes.CDLL(str(build_c_library(CPU_KERNELS)))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    library.initialize()
    return library


def as_fp32(x: Tensor) -> Tensor:
    """`x` as the kernels take it, itself if it is so already."""
    return x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()
