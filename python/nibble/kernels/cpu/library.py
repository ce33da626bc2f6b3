"""The C library as Python functions on raw addresses; the sources say what each takes."""

import ctypes
import functools

from torch import Tensor

from nibble.config.resolve import CPU_KERNELS
from nibble.utils.c_library import build_c_library

_INT, _FLOAT, _ADDRESS = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "initialize": [],
    "quantize_rows": [_ADDRESS, _INT, _INT, _FLOAT, _ADDRESS, _ADDRESS],
    "decode_rows": [_ADDRESS, _INT, _ADDRESS] + [_INT] * 3 + [_ADDRESS] * 2,
    "quantize_pack": [_ADDRESS] * 3 + [_INT] * 3 + [_FLOAT] + [_INT] * 4 + [_ADDRESS],
    "matmul_nvfp4": [_ADDRESS] * 2 + [_INT] * 2 + [_ADDRESS] * 3 + [_INT] + [_ADDRESS] * 2,
    "fused_moe_nvfp4": [_ADDRESS] * 3 + [_INT, _ADDRESS] + [_INT] * 7 + [_ADDRESS] * 11,
    "rms_norm": [_ADDRESS] + [_INT] * 3 + [_ADDRESS, _FLOAT, _ADDRESS],
    "norm_rope": [_ADDRESS] + [_INT] * 4 + [_ADDRESS, _FLOAT] + [_ADDRESS] * 4,
    "store_kv": [_ADDRESS, _INT, _ADDRESS] + [_INT] * 3 + [_ADDRESS] * 3,
    "decode_attention": [_ADDRESS] * 4 + [_INT, _ADDRESS] + [_INT] * 5 + [_ADDRESS, _INT, _ADDRESS],
    "topk_softmax": [_ADDRESS] + [_INT] * 3 + [ctypes.c_int] + [_ADDRESS] * 3,
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


def address(tensor: Tensor) -> int:
    """Of the first element; the tensor must outlive the call."""
    return tensor.data_ptr()
