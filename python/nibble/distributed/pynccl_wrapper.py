"""NCCL's C interface by ctypes: the few functions that `pynccl.py` needs, with types and with errors as exceptions.

Not through torch.distributed, because PyTorch's NCCL may be too old (two ranks on one GPU need 2.30) and its process
groups add streams, events and threads of their own to every call. The C interface is that of nccl.h.
"""

import ctypes
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, NewType

from nibble.distributed.communicator import PeerError
from nibble.utils.errors import ConfigError

logger = logging.getLogger(__name__)

PATH_VARIABLE = "NIBBLE_NCCL_SO_PATH"
SONAME = "libnccl.so.2"
MINIMUM_VERSION = (2, 18, 0)

UNIQUE_ID_BYTES = 128
SUCCESS, IN_PROGRESS = 0, 7  # of ncclResult_t
SUM = 0  # of ncclRedOp_t

Comm = NewType("Comm", int)  # ncclComm_t, the address of NCCL's communicator


class DataType(IntEnum):
    """ncclDataType_t"""

    INT8 = 0
    UINT8 = 1
    INT32 = 2
    INT64 = 4
    FLOAT16 = 6
    FLOAT32 = 7
    FLOAT64 = 8
    BFLOAT16 = 9


class UniqueId(ctypes.Structure):
    """ncclUniqueId, which travels by value."""

    _fields_ = [("internal", ctypes.c_char * UNIQUE_ID_BYTES)]


class NcclError(PeerError):
    """A function of NCCL failed. The message names the function, NCCL's error and its last words in the log."""


_ARGUMENTS: dict[str, list[Any]] = {
    "ncclGetUniqueId": [POINTER(UniqueId)],
    "ncclCommInitRank": [POINTER(c_void_p), c_int, UniqueId, c_int],
    "ncclCommDestroy": [c_void_p],
    "ncclCommAbort": [c_void_p],
    "ncclCommGetAsyncError": [c_void_p, POINTER(c_int)],
    "ncclGroupStart": [],
    "ncclGroupEnd": [],
    # send, receive (one address for Send and Recv), count, data type, (operation), (root or peer), comm, stream
    "ncclAllReduce": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclAllGather": [c_void_p, c_void_p, c_size_t, c_int, c_void_p, c_void_p],
    "ncclReduceScatter": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclBroadcast": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclReduce": [c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_void_p, c_void_p],
    "ncclSend": [c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
    "ncclRecv": [c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p],
}


class NcclLibrary:
    """The functions of one libnccl. Collectives, send and receive are launched on a stream and return at once.

    Addresses, streams and communicators are integers as C sees them; counts are in elements of the data type.
    Every method raises NcclError when NCCL reports an error.
    """

    def __init__(self, library: Any, path: str) -> None:
        """`library` is what `ctypes.CDLL(path)` gives. Raises ConfigError if it isn't NCCL, or too old."""
        self.path = path
        self.version = _version_of(library, path)
        if self.version < MINIMUM_VERSION:
            raise ConfigError(
                f"NCCL must be {_dotted(MINIMUM_VERSION)} or newer, found {_dotted(self.version)} at {path}: install a "
                f"newer nvidia-nccl-cu12 or nvidia-nccl-cu13, or set {PATH_VARIABLE} to another {SONAME}"
            )
        self._functions = {name: _bind(library, path, name, arguments) for name, arguments in _ARGUMENTS.items()}
        self._error_string = _bind(library, path, "ncclGetErrorString", [c_int], c_char_p)
        self._last_error = _bind(library, path, "ncclGetLastError", [c_void_p], c_char_p)

    @property
    def dotted_version(self) -> str:
        return _dotted(self.version)

    def get_unique_id(self) -> bytes:
        """What the ranks of a new communicator need to find each other: made by one, given to all."""
        unique_id = UniqueId()
        self._call("ncclGetUniqueId", byref(unique_id))
        return bytes(unique_id)

    def comm_init_rank(self, world_size: int, unique_id: bytes, rank: int) -> Comm:
        """Returns once all ranks have called it, which may be never. Uses the thread's current device."""
        comm = c_void_p()
        self._call("ncclCommInitRank", byref(comm), world_size, UniqueId.from_buffer_copy(unique_id), rank)
        assert comm.value is not None
        return Comm(comm.value)

    def comm_destroy(self, comm: Comm) -> None:
        """Returns when the communicator's work on the GPU is done and no CUDA graph holds any of it."""
        self._call("ncclCommDestroy", comm)

    def comm_abort(self, comm: Comm) -> None:
        """Ends the communicator's kernels, finished or not. Waits for its CUDA graphs as `comm_destroy` does."""
        self._call("ncclCommAbort", comm)

    def raise_async_error(self, comm: Comm) -> None:
        """Raises what has gone wrong since a call returned, in NCCL's threads or on the GPU."""
        error = c_int()
        self._call("ncclCommGetAsyncError", comm, byref(error))
        if error.value not in (SUCCESS, IN_PROGRESS):
            raise NcclError(f"NCCL failed: {self._describe(error.value)}")

    @contextmanager
    def group(self) -> Iterator[None]:
        """What is launched inside starts together when the block ends. Groups are not nested here."""
        self._call("ncclGroupStart")
        try:
            yield
        except BaseException:
            self._functions["ncclGroupEnd"]()  # or all that this thread launches later would wait for it
            raise
        self._call("ncclGroupEnd")

    def all_reduce(self, send: int, recv: int, count: int, dtype: DataType, comm: Comm, stream: int) -> None:
        self._call("ncclAllReduce", send, recv, count, dtype, SUM, comm, stream)

    def all_gather(self, send: int, recv: int, send_count: int, dtype: DataType, comm: Comm, stream: int) -> None:
        self._call("ncclAllGather", send, recv, send_count, dtype, comm, stream)

    def reduce_scatter(self, send: int, recv: int, recv_count: int, dtype: DataType, comm: Comm, stream: int) -> None:
        self._call("ncclReduceScatter", send, recv, recv_count, dtype, SUM, comm, stream)

    def broadcast(self, send: int, recv: int, count: int, dtype: DataType, root: int, comm: Comm, stream: int) -> None:
        """`send` is read on the root only."""
        self._call("ncclBroadcast", send, recv, count, dtype, root, comm, stream)

    def reduce(self, send: int, recv: int, count: int, dtype: DataType, root: int, comm: Comm, stream: int) -> None:
        """`recv` is written on the root only and may be 0 elsewhere."""
        self._call("ncclReduce", send, recv, count, dtype, SUM, root, comm, stream)

    def send(self, send: int, count: int, dtype: DataType, peer: int, comm: Comm, stream: int) -> None:
        self._call("ncclSend", send, count, dtype, peer, comm, stream)

    def recv(self, recv: int, count: int, dtype: DataType, peer: int, comm: Comm, stream: int) -> None:
        self._call("ncclRecv", recv, count, dtype, peer, comm, stream)

    def _call(self, name: str, *arguments: Any) -> None:
        result = self._functions[name](*arguments)
        if result != SUCCESS:
            raise NcclError(f"{name} failed: {self._describe(result)}")

    def _describe(self, result: int) -> str:
        text = f"{self._error_string(result).decode(errors='replace')} (ncclResult_t {result})"
        last = (self._last_error(None) or b"").decode(errors="replace").strip()
        return f"{text}; {last}" if last else text


@cache
def load_nccl() -> NcclLibrary:
    """The library at `find_nccl`, loaded once a process. Raises ConfigError if it can't be, or is too old."""
    path = find_nccl()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ConfigError(
            f"NCCL cannot be loaded ({error}): install nvidia-nccl-cu12 or nvidia-nccl-cu13, or set {PATH_VARIABLE} "
            f"to the path of {SONAME}"
        ) from error
    nccl = NcclLibrary(library, path)
    logger.info("NCCL %s from %s", nccl.dotted_version, nccl.path)
    return nccl


def find_nccl() -> str:
    """The path in NIBBLE_NCCL_SO_PATH, else the library of the nvidia-nccl package.

    Else its bare name, which stands for the one that PyTorch has loaded or the system has.
    """
    if path := os.environ.get(PATH_VARIABLE):
        return path
    try:
        package = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:
        package = None
    for folder in package.submodule_search_locations or () if package else ():
        library = Path(folder) / "lib" / SONAME
        if library.exists():
            return str(library)
    return SONAME


def _bind(library: Any, path: str, name: str, arguments: list[Any], result: Any = c_int) -> Any:
    try:
        function = getattr(library, name)
    except AttributeError as error:
        raise ConfigError(f"{path} is not an NCCL library: it has no {name}; check {PATH_VARIABLE}") from error
    function.argtypes, function.restype = arguments, result
    return function


def _version_of(library: Any, path: str) -> tuple[int, int, int]:
    code = c_int()
    result = _bind(library, path, "ncclGetVersion", [POINTER(c_int)])(byref(code))
    if result != SUCCESS:
        raise ConfigError(f"ncclGetVersion of {path} failed (ncclResult_t {result})")
    # NCCL_VERSION in nccl.h: 2.8.4 is 2804, 2.30.7 is 23007.
    major, rest = divmod(code.value, 1000 if code.value < 10000 else 10000)
    return major, *divmod(rest, 100)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
