"""GPU memory that processes of one host share: CUDA's IPC, through the driver's C interface.

The driver is the one library with the same name everywhere; the runtime's depends on who brought it. Functions work on
the current context of the thread, PyTorch's once it has allocated something on the device.
"""

import ctypes
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


class CudaIpcError(Exception):
    """A call failed; the message has the driver's reason."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class CudaIpc:
    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaIpcError(str(error)) from error
        address, address_out = ctypes.c_uint64, ctypes.POINTER(ctypes.c_uint64)
        self._alloc = self._function("cuMemAlloc_v2", address_out, ctypes.c_size_t)
        self._free = self._function("cuMemFree_v2", address)
        self._get = self._function("cuIpcGetMemHandle", ctypes.POINTER(_Handle), address)
        self._open = self._function("cuIpcOpenMemHandle_v2", address_out, _Handle, ctypes.c_uint)
        self._close = self._function("cuIpcCloseMemHandle", address)

    def allocate(self, num_bytes: int) -> int:
        """The address of memory of the current device; not PyTorch's, whose allocator moves and splits its own."""
        address = ctypes.c_uint64()
        self._check("cuMemAlloc", self._alloc(ctypes.byref(address), num_bytes))
        return address.value

    def free(self, address: int) -> None:
        """Only after all others have closed it."""
        self._check("cuMemFree", self._free(address))

    def export(self, address: int) -> bytes:
        """The handle by which other processes of this host open what `allocate` returned."""
        handle = _Handle()
        self._check("cuIpcGetMemHandle", self._get(ctypes.byref(handle), address))
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """The address at which another process's memory is mapped here, on its own or another GPU."""
        address = ctypes.c_uint64()
        opened = self._open(ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS)
        self._check("cuIpcOpenMemHandle", opened)
        return address.value

    def close(self, address: int) -> None:
        self._check("cuIpcCloseMemHandle", self._close(address))

    def _function(self, name: str, *arguments: Any) -> Any:
        function = getattr(self._driver, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int
        return function

    def _check(self, call: str, result: int) -> None:
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(ctypes.c_int(result), ctypes.byref(text))
            reason = text.value.decode() if text.value else "unknown error"
            raise CudaIpcError(f"{call} failed with {reason} ({result})")


def as_tensor(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """Memory of `device` as a tensor of bytes, which does not own it."""

    memory = SimpleNamespace(
        __cuda_array_interface__={"shape": (num_bytes,), "typestr": "|u1", "data": (address, False), "version": 3}
    )
    return torch.as_tensor(memory, device=device)
