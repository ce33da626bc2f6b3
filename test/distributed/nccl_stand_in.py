"""A stand-in of libnccl for tests without a GPU: the same functions for C, on memory of the CPU.

It notes every call. `deliver` then does what NCCL's kernels would do: it matches the calls of all ranks, which live
in one process, and moves and adds the bytes. Signatures and constants are written down here a second time, from
nccl.h, and each function is a C function of exactly that signature, so wrong ones in the wrapper do not cancel out.
"""

import ctypes
from collections import defaultdict
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    0: torch.int8, 1: torch.uint8, 2: torch.int32, 4: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 9: torch.bfloat16,
}  # fmt: skip
ERRORS = {1: b"unhandled cuda error", 2: b"unhandled system error", 5: b"invalid usage", 6: b"remote process exited"}
LAST_ERROR = b"Cuda failure 'out of memory'"


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_char * 128)]


@dataclass(frozen=True)
class Call:
    """`send`, `recv` and `stream` are what the caller passed; `peer` is the root, destination or source."""

    rank: int
    name: str
    send: int
    recv: int
    count: int
    dtype: int
    peer: int
    stream: int
    group: int  # running number of the group, 0 outside

    @property
    def nbytes(self) -> int:
        return self.count * DTYPES[self.dtype].itemsize


class NcclStandIn:
    """Give it to `NcclLibrary` in place of a `ctypes.CDLL`. It serves one communicator per rank.

    `fails` maps a function's name to the ncclResult_t that it returns instead of doing anything; `before` maps it to
    what runs first.
    """

    def __init__(self, version: int = 23007) -> None:
        self.version = version
        self.calls: list[Call] = []
        self.fails: dict[str, int] = {}
        self.before: dict[str, Callable[[], object]] = {}
        self.async_error = 0
        self.ended: list[tuple[str, int]] = []  # ("destroy" or "abort", rank)
        self.group_depth = 0
        self.deepest_group = 0
        self.groups = 0
        self._ranks: dict[int, int] = {}  # by communicator
        self._unique_ids: set[bytes] = set()
        self._launched: dict[int, list[Call]] = defaultdict(list)
        self._texts = {code: ctypes.create_string_buffer(text) for code, text in (*ERRORS.items(), (-1, LAST_ERROR))}
        collective = (c_void_p, c_void_p, c_size_t, c_int)
        for name, arguments, function in (
            ("ncclGetVersion", (c_void_p,), lambda out: _write_int(out, self.version)),
            ("ncclGetUniqueId", (c_void_p,), self._get_unique_id),
            ("ncclCommInitRank", (c_void_p, c_int, UniqueId, c_int), self._init),
            ("ncclCommDestroy", (c_void_p,), lambda comm: self._end("destroy", comm)),
            ("ncclCommAbort", (c_void_p,), lambda comm: self._end("abort", comm)),
            ("ncclCommGetAsyncError", (c_void_p, c_void_p), lambda _, out: _write_int(out, self.async_error)),
            ("ncclGroupStart", (), self._group_start),
            ("ncclGroupEnd", (), self._group_end),
            ("ncclAllReduce", (*collective, c_int, c_void_p, c_void_p), self._reduction("all_reduce")),
            ("ncclReduceScatter", (*collective, c_int, c_void_p, c_void_p), self._reduction("reduce_scatter")),
            ("ncclAllGather", (*collective, c_void_p, c_void_p), self._all_gather),
            ("ncclBroadcast", (*collective, c_int, c_void_p, c_void_p), self._broadcast),
            ("ncclReduce", (*collective, c_int, c_int, c_void_p, c_void_p), self._reduce),
            ("ncclSend", (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p), self._send),
            ("ncclRecv", (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p), self._recv),
        ):
            setattr(self, name, CFUNCTYPE(c_int, *arguments)(self._failing(name, function)))
        # void pointers: a callback that returns char * leaks
        self.ncclGetErrorString = CFUNCTYPE(c_void_p, c_int)(lambda code: ctypes.addressof(self._texts[code]))
        self.ncclGetLastError = CFUNCTYPE(c_void_p, c_void_p)(lambda _: ctypes.addressof(self._texts[-1]))

    def of_rank(self, rank: int) -> list[Call]:
        return [call for call in self.calls if call.rank == rank]

    def deliver(self) -> None:
        """Runs what all ranks have launched. Fails if they launched different things."""
        launched = [self._launched[rank] for rank in range(len(self._ranks))]
        self._launched = defaultdict(list)
        collectives = [[call for call in calls if call.name not in ("send", "recv")] for calls in launched]
        for calls in zip(*collectives, strict=True):
            shapes = {(call.name, call.count, call.dtype, call.peer, call.group == 0) for call in calls}
            assert len(shapes) == 1, f"the ranks are out of step: {calls}"
            assert {call.rank for call in calls} == set(self._ranks.values())
            _run_collective(calls)
        sends = [call for calls in launched for call in calls if call.name == "send"]
        recvs = [call for calls in launched for call in calls if call.name == "recv"]
        for send in sends:
            recv = next(call for call in recvs if (call.rank, call.peer) == (send.peer, send.rank))
            recvs.remove(recv)
            assert (send.count, send.dtype) == (recv.count, recv.dtype)
            _bytes_at(recv.recv, recv.nbytes).copy_(_bytes_at(send.send, send.nbytes))
        assert not recvs, f"nobody sends: {recvs}"

    def _failing(self, name: str, function: Callable[..., int | None]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.before.get(name, lambda: None)()
            return self.fails[name] if name in self.fails else function(*arguments) or 0

        return call

    def _get_unique_id(self, out: int) -> None:
        unique_id = bytes([len(self._unique_ids), 0, *range(130, 256)])
        self._unique_ids.add(unique_id)
        ctypes.memmove(out, unique_id, 128)

    def _init(self, out: int, world_size: int, unique_id: UniqueId, rank: int) -> int:
        if bytes(unique_id) not in self._unique_ids or rank in self._ranks.values() or rank >= world_size:
            return 5
        comm = 0x7F00_0000_1000 + rank  # more than 32 bits, as addresses are
        self._ranks[comm] = rank
        ctypes.c_uint64.from_address(out).value = comm
        return 0

    def _end(self, how: str, comm: int) -> None:
        self.ended.append((how, self._ranks[comm]))

    def _group_start(self) -> None:
        self.group_depth += 1
        self.deepest_group = max(self.deepest_group, self.group_depth)
        self.groups += 1

    def _group_end(self) -> None:
        self.group_depth -= 1

    def _note(self, name: str, send: int, recv: int, count: int, dtype: int, peer: int, comm: int, stream: int) -> None:
        group = self.groups if self.group_depth else 0
        call = Call(self._ranks[comm], name, send or 0, recv or 0, count, dtype, peer, stream, group)
        self.calls.append(call)
        self._launched[call.rank].append(call)

    def _all_gather(self, send: int, recv: int, count: int, dtype: int, comm: int, stream: int) -> None:
        self._note("all_gather", send, recv, count, dtype, -1, comm, stream)

    def _broadcast(self, send: int, recv: int, count: int, dtype: int, root: int, comm: int, stream: int) -> None:
        self._note("broadcast", send, recv, count, dtype, root, comm, stream)

    def _reduction(self, name: str) -> Callable[..., int]:
        def reduction(send: int, recv: int, count: int, dtype: int, op: int, comm: int, stream: int) -> int:
            self._note(name, send, recv, count, dtype, -1, comm, stream)
            return 5 if op else 0  # ncclSum is 0

        return reduction

    def _reduce(self, send: int, recv: int, count: int, dtype: int, op: int, root: int, comm: int, stream: int) -> int:
        self._note("reduce", send, recv, count, dtype, root, comm, stream)
        return 5 if op else 0

    def _send(self, send: int, count: int, dtype: int, peer: int, comm: int, stream: int) -> None:
        self._note("send", send, 0, count, dtype, peer, comm, stream)

    def _recv(self, recv: int, count: int, dtype: int, peer: int, comm: int, stream: int) -> None:
        self._note("recv", 0, recv, count, dtype, peer, comm, stream)


class CudaStandIn:
    """What `PyNcclCommunicator` needs of torch.cuda, and a stream."""

    def __init__(self) -> None:
        self.cuda_stream = 0x57AE
        self.capturing = False
        self.hangs = False
        self.devices: list[torch.device] = []

    def set_device(self, device: torch.device) -> None:
        self.devices.append(device)

    def current_stream(self, device: torch.device) -> "CudaStandIn":
        return self

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def query(self) -> bool:
        return not self.hangs


def _run_collective(calls: tuple[Call, ...]) -> None:
    """What nccl.h says of each collective; `calls` are those of all ranks."""
    first = calls[0]
    calls = tuple(sorted(calls, key=lambda call: call.rank))
    if first.name == "broadcast":
        source = _bytes_at(calls[first.peer].send, first.nbytes).clone()
        for call in calls:
            _bytes_at(call.recv, call.nbytes).copy_(source)
    elif first.name == "all_gather":
        rows = torch.cat([_bytes_at(call.send, call.nbytes) for call in calls])
        for call in calls:
            _bytes_at(call.recv, len(rows)).copy_(rows)
    else:
        parts = len(calls) if first.name == "reduce_scatter" else 1
        terms = [_bytes_at(call.send, call.nbytes * parts).view(DTYPES[call.dtype]) for call in calls]
        total = torch.stack(terms).sum(0, dtype=terms[0].dtype).view(torch.uint8)
        for call in calls:
            if first.name == "reduce_scatter":
                _bytes_at(call.recv, call.nbytes).copy_(total.split(call.nbytes)[call.rank])
            elif first.name == "all_reduce" or call.rank == call.peer:
                _bytes_at(call.recv, call.nbytes).copy_(total)


def _bytes_at(address: int, count: int) -> Tensor:
    assert address, "a null pointer is read or written"
    return torch.frombuffer((ctypes.c_char * count).from_address(address), dtype=torch.uint8)


def _write_int(address: int, value: int) -> None:
    c_int.from_address(address).value = value
