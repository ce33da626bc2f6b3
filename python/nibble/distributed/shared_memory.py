"""Collectives between the ranks of one host, through shared memory. Linux; needs a C compiler, once.

Every rank owns one segment of shared memory (a memfd: it has no name, so nothing is left behind however a rank
dies) and maps those of its peers. It begins with a board, on which the rank announces its rounds, and two halves
follow. Each pair of ranks is joined by a Unix socket, over which they swap segments, and which tells a rank that
waits whether its peer is still alive. A collective is one round, or several when a payload is larger than a half:

    write into the own half -> announce the round -> wait until every peer has -> read the peers' halves

No half is overwritten while somebody reads it. Round n uses half n % 2 of every segment, so a rank writes over
its round n in round n + 2, hence after it finished round n + 1, hence after every peer announced round n + 1. A
peer announces round n + 1 only after it finished round n, its reads included. So one rendezvous a round is
enough, and a fast rank may write its next round while a slow one still reads the previous.

Announcing a round releases what was written before, and seeing it acquires that; see rendezvous.c.

A header stands beside a round on the board. It holds the round, the collective and a hash of sizes, widths and
dtype. All ranks of a round must have the same one, so ranks that are out of step get an error instead of each
other's bytes.
"""

import ctypes
import errno
import functools
import mmap
import os
import re
import select
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from nibble.config.resolve import RENDEZVOUS
from nibble.distributed.communicator import (
    SUMMABLE_DTYPES,
    CollectiveError,
    Communicator,
    PeerError,
    ranks_in_words,
    sum_in_rank_order,
)
from nibble.utils.c_library import build_c_library

COLLECTIVES = (
    "barrier", "broadcast", "all_gather", "all_gatherv", "reduce_scatter", "reduce_scatterv", "all_reduce",
    "all_to_allv",
)  # fmt: skip
HEADER = struct.Struct("<IIq")  # round, index into COLLECTIVES, hash of what travels
MAX_MESSAGE = 1024  # bytes of the text with which a rank that failed says why
BOARD_BYTES, ROUND_BYTES = 128, 64  # of rendezvous.c: the whole board, and what precedes its headers
HELLO = struct.Struct("<IIQ")  # rank, world size, buffer_bytes

SILENT, ANNOUNCED = 0, 1  # what await_peer returns

SPINS = 300
YIELDS = 1000
"""How often a rank looks at a board keeping its core, and then yielding it, before it sleeps until it is told."""

SLEEP_MS = 20
"""How long it sleeps before it makes sure that the peer is alive."""


class SharedMemoryCommunicator(Communicator):
    """A group of processes of one user on one host. Sums are those of `sum_in_rank_order`."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        run_dir: Path,
        name: str,
        timeout_s: float,
        buffer_bytes: int = 8 << 20,
        ranks_on_host: int | None = None,
    ) -> None:
        """Joins the group; returns when every rank has.

        `run_dir` is a directory of this user's with mode 0700; `name` is unique among the groups that use it. A
        rank waits at most `timeout_s` for the others, here and in every round. `buffer_bytes` is the size of half a
        segment, of which only what payloads touch takes memory; larger payloads travel in pieces. `ranks_on_host`
        counts the ranks that share the cores, if those of this group are not all.
        """
        super().__init__(rank, world_size, name)
        if buffer_bytes < 64 * world_size:
            raise ValueError(f"buffer_bytes must be at least {64 * world_size}, got {buffer_bytes}")
        self._timeout_s = timeout_s
        buffer_bytes = -(-buffer_bytes // 64) * 64
        self._half_bytes = buffer_bytes
        self._slot_bytes = buffer_bytes // world_size // 64 * 64
        self._round = 0
        hello = HELLO.pack(rank, world_size, buffer_bytes)
        size = BOARD_BYTES + 2 * buffer_bytes
        try:
            self._links, self._segments = _join(rank, world_size, run_dir, name, timeout_s, hello, size)
        except (PeerError, ConnectionError) as error:
            reason = error if isinstance(error, PeerError) else "a peer left while joining"
            raise CollectiveError(f"joining group {name!r}, rank {rank}: {reason}") from error
        self._library = _rendezvous()
        self._addresses = [_address(segment) for segment in self._segments]
        # With fewer cores than ranks, a rank that looks keeps a core from the peer that it waits for.
        has_core = (ranks_on_host or world_size) <= len(os.sched_getaffinity(0))
        looks = (SPINS, YIELDS) if has_core else (0, 0)
        self._pointers = (ctypes.c_void_p * world_size)(*self._addresses)
        self._group = _Group(ctypes.addressof(self._pointers), rank, world_size, *looks)

    def close(self) -> None:
        for link in self._links.values():
            if self._closed_because:  # after a failure; the peers would only see that this rank left
                with suppress(OSError):
                    link.send(self._closed_because.encode()[:MAX_MESSAGE])
        if self._links and self._closed_because:
            self._library.fail(self._addresses[self.rank])
        for link in self._links.values():
            link.close()
        super().close()
        self._links = {}
        self._segments = []  # unmapped with their last view, which the traceback of an error may still hold

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        total = sum(sizes)
        outputs = [tensor.new_empty((total, *tensor.shape[1:])) for tensor in tensors]
        plan = _plan_gather(sizes, tuple([output.nbytes // total for output in outputs]), self._half_bytes)
        self._gather_rounds(plan, _pointers(tensors), _pointers(outputs))
        return outputs

    def _prepare_all_gather(self, x: Tensor, output: Tensor) -> Callable[[], None]:
        plan = _plan_gather((x.shape[0],) * self.world_size, (x.nbytes // x.shape[0],), self._half_bytes)
        return functools.partial(self._gather_rounds, plan, _pointers((x,)), _pointers((output,)))

    def _gather_rounds(self, plan: "_GatherPlan", sources: "_Pointers", targets: "_Pointers") -> None:
        for copies, first in plan.rounds:
            half = self._next_half()
            header = self._header_of(plan.signature)
            where = half, copies, first
            if not self._library.gather(self._group, self._round, header, *where, sources, targets):
                self._wait(header)
                self._library.take_rows(self._group, *where, targets)

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        output = x.new_empty((sizes[self.rank], *x.shape[1:]))
        for first, terms in self._scatter_rounds(x, sizes):
            sum_in_rank_order(terms, output.view(-1)[first : first + len(terms[0])])
        return output

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        output = x.new_empty((self.world_size * sizes[self.rank], *x.shape[1:]))
        from_rank = _as_bytes(output).view(self.world_size, -1)
        for first, terms in self._scatter_rounds(_as_bytes(x).view(x.shape[0], -1), sizes):
            for target, term in zip(from_rank, terms, strict=True):
                target[first : first + len(term)] = term
        return output

    def _scatter_rounds(self, x: Tensor, sizes: tuple[int, ...]) -> Iterator[tuple[int, list[Tensor]]]:
        """What all ranks have for this rank's rows, in rank order, piece by piece: where a piece begins in the flat
        rows, and that of each rank, to be read before the next one is asked for.
        """
        # Half a segment holds one slot per rank: what the segment's owner has for the rows of that rank.
        slot_bytes, itemsize = self._slot_bytes, x.itemsize
        plan = _plan_scatter(sizes, x.nbytes // x.shape[0], SUMMABLE_DTYPES.index(x.dtype))
        source, num_bytes = x.data_ptr(), plan.num_bytes[self.rank]
        own_rows = x.view(-1)[plan.starts[self.rank] // itemsize :]
        for begin in range(0, plan.most, slot_bytes):
            half = self._next_half()
            own = self._addresses[self.rank] + half
            for peer in self._links:
                count = min(slot_bytes, plan.num_bytes[peer] - begin)
                if count > 0:
                    ctypes.memmove(own + peer * slot_bytes, source + plan.starts[peer] + begin, count)
            self._meet(plan.signature)
            first, last = begin // itemsize, min(begin + slot_bytes, num_bytes) // itemsize
            if first < last:
                yield first, self._slots(half + self.rank * slot_bytes, own_rows[first:last])

    def _slots(self, offset: int, mine: Tensor) -> list[Tensor]:
        """In rank order, `mine` and what lies at `offset` of the peers' segments, in the same dtype and number."""
        return [
            mine
            if rank == self.rank
            else torch.frombuffer(segment, dtype=mine.dtype, count=mine.numel(), offset=offset)
            for rank, segment in enumerate(self._segments)
        ]

    def _broadcast(self, x: Tensor, src: int) -> None:
        for begin in range(0, x.nbytes, self._half_bytes):
            half = self._next_half()
            count = min(self._half_bytes, x.nbytes - begin)
            if self.rank == src:
                ctypes.memmove(self._addresses[src] + half, x.data_ptr() + begin, count)
            self._meet(hash((src, x.nbytes)))
            if self.rank != src:
                ctypes.memmove(x.data_ptr() + begin, self._addresses[src] + half, count)

    def _barrier(self) -> None:
        self._next_half()
        self._meet(0)

    def _next_half(self) -> int:
        """Starts a round. Returns where its half begins in every segment."""
        self._round = (self._round + 1) & 0xFFFFFFFF
        return BOARD_BYTES + (self._round & 1) * self._half_bytes

    def _header_of(self, signature: int) -> bytes:
        return HEADER.pack(self._round, COLLECTIVES.index(self._collective), signature)

    def _meet(self, signature: int) -> None:
        """Announces this round; returns once every peer has, with the same header."""
        header = self._header_of(signature)
        if not self._library.meet(self._group, self._round, header):
            self._wait(header)

    def _wait(self, header: bytes) -> None:
        """As long as it takes, after the announcement."""
        place = ROUND_BYTES + (self._round & 1) * HEADER.size
        for peer, link in self._links.items():
            self._sleep_until_announced(peer, link)
            theirs = self._segments[peer][place : place + HEADER.size]
            if theirs != header:
                raise PeerError(_out_of_step(peer, theirs, header))

    def _sleep_until_announced(self, peer: int, link: socket.socket) -> None:
        deadline = time.monotonic() + self._timeout_s
        poll = select.poll()
        poll.register(link, select.POLLIN)  # readable when it was closed, with or without words
        while self._state(peer, SLEEP_MS) != ANNOUNCED:
            if poll.poll(0) and self._state(peer) != ANNOUNCED:
                raise self._gone()
            if time.monotonic() > deadline:
                silent = [peer for peer in self._links if self._state(peer) == SILENT]
                raise PeerError(f"{ranks_in_words(silent)} did not arrive within {self._timeout_s:g} s")

    def _state(self, peer: int, milliseconds: int = 0) -> int:
        state: int = self._library.await_peer(self._addresses[peer], self._round, 0, 0, milliseconds)
        return state

    def _gone(self) -> PeerError:
        """Names the peers that hung up without a word; if there is none yet, repeats what another one said."""
        poll = select.poll()
        for link in self._links.values():
            poll.register(link, select.POLLIN)  # there are words, or the end
        readable = {descriptor for descriptor, _ in poll.poll(0)}
        words = {peer: _last_words(link) for peer, link in self._links.items() if link.fileno() in readable}
        silent = [peer for peer, text in words.items() if not text]
        if silent:
            return PeerError(f"{ranks_in_words(silent)} left the group: the process died or closed it")
        peer, text = next(iter(words.items()))
        return PeerError(f"rank {peer} gave up: {text}")


def _last_words(link: socket.socket) -> str:
    """What a peer that hung up said, if anything."""
    with suppress(ConnectionError):
        return link.recv(MAX_MESSAGE).decode(errors="replace")
    return ""


class _Group(ctypes.Structure):
    """`Group` of rendezvous.c."""

    _fields_ = (
        ("segments", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rank", "num_ranks", "spins", "yields")),
    )


class _Copy(ctypes.Structure):
    """`Copy` of rendezvous.c: a part of one rank's rows of one tensor, in bytes."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("tensor", "in_rows", "in_output", "at", "num_bytes"))


@dataclass(frozen=True)
class _GatherPlan:
    rounds: list[tuple["ctypes.Array[_Copy]", "ctypes.Array[ctypes.c_int64]"]]
    """For each round the copies of all ranks, and where each rank's begin."""
    signature: int


@functools.lru_cache(maxsize=1024)
def _plan_gather(sizes: tuple[int, ...], widths: tuple[int, ...], half_bytes: int) -> _GatherPlan:
    """`widths` are the bytes of a row of each tensor. A rank's payload is its rows of the tensors in turn."""
    num_rounds = -(-max(sizes) * sum(widths) // half_bytes)
    rounds: list[list[list[_Copy]]] = [[[] for _ in sizes] for _ in range(num_rounds)]
    for rank, (start, size) in enumerate(zip(accumulate(sizes, initial=0), sizes, strict=False)):
        position = 0  # in the rank's payload
        for tensor, width in enumerate(widths):
            done, total = 0, size * width
            while done < total:
                round_number, at = divmod(position, half_bytes)
                count = min(total - done, half_bytes - at)
                rounds[round_number][rank].append(_Copy(tensor, done, start * width + done, at, count))
                done, position = done + count, position + count
    return _GatherPlan([_flattened(copies) for copies in rounds], hash((sizes, widths)))


def _flattened(copies: list[list[_Copy]]) -> tuple["ctypes.Array[_Copy]", "ctypes.Array[ctypes.c_int64]"]:
    """The copies of all ranks one after the other, and where each rank's begin."""
    everything = [copy for of_rank in copies for copy in of_rank]
    first = list(accumulate(map(len, copies), initial=0))
    return (_Copy * len(everything))(*everything), (ctypes.c_int64 * len(first))(*first)


_Pointers: TypeAlias = "ctypes.Array[ctypes.c_void_p]"


def _pointers(tensors: Sequence[Tensor]) -> _Pointers:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@dataclass(frozen=True)
class _ScatterPlan:
    """Where each rank's rows lie in the tensor to be summed, in bytes."""

    starts: list[int]
    num_bytes: list[int]
    most: int
    signature: int


@functools.lru_cache(maxsize=1024)
def _plan_scatter(sizes: tuple[int, ...], width: int, dtype: int) -> _ScatterPlan:
    """`width` is the bytes of a row, `dtype` what else the ranks must agree on."""
    num_bytes = [size * width for size in sizes]
    starts = list(accumulate(num_bytes, initial=0))[:-1]
    return _ScatterPlan(starts, num_bytes, max(num_bytes), hash((sizes, width, dtype)))


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _out_of_step(peer: int, theirs: bytes, ours: bytes) -> str:
    their_round, their_collective, _ = HEADER.unpack(theirs)
    our_round, our_collective, _ = HEADER.unpack(ours)
    if (their_round, their_collective) == (our_round, our_collective):
        return f"rank {peer} entered with other sizes, shapes or dtypes than this rank"
    return (
        f"rank {peer} is in round {their_round}, {COLLECTIVES[their_collective]}, and this rank in round "
        f"{our_round}, {COLLECTIVES[our_collective]}: all ranks must enter the same collectives in the same order"
    )


@functools.cache
def _rendezvous() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_c_library(RENDEZVOUS)))
    group, header, half = ctypes.POINTER(_Group), ctypes.c_char_p, ctypes.c_int64
    library.meet.argtypes = (group, ctypes.c_uint32, header)
    library.gather.argtypes = (group, ctypes.c_uint32, header, half, *[ctypes.c_void_p] * 4)
    library.take_rows.argtypes = (group, half, *[ctypes.c_void_p] * 3)
    library.fail.argtypes = (ctypes.c_void_p,)
    library.take_rows.restype = library.fail.restype = None
    library.await_peer.argtypes = (ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_int, ctypes.c_int)
    return library


def _address(segment: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(segment))


def _join(
    rank: int, world_size: int, run_dir: Path, name: str, timeout_s: float, hello: bytes, segment_bytes: int
) -> tuple[dict[int, socket.socket], list[mmap.mmap]]:
    """Meets the peers. Returns the sockets by peer and the segments of all ranks.

    Each rank listens on `run_dir/name.rank` for the higher ranks and dials the lower ones; both sides say hello
    and pass their segment's descriptor. The socket's file is removed once this rank has met all others.
    """
    _check_private(run_dir)
    if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise ValueError(f"a group's name is 1 to 64 letters, digits, '_', '-' and '.', got {name!r}")
    deadline = time.monotonic() + timeout_s
    with ExitStack() as cleanup, ExitStack() as on_failure, selectors.DefaultSelector() as selector:
        # Through the directory's descriptor, because a socket's path is limited to 107 bytes.
        directory = os.open(run_dir, os.O_DIRECTORY)
        cleanup.callback(os.close, directory)
        path = f"/proc/self/fd/{directory}/{name}."
        listener = cleanup.enter_context(_listen(f"{path}{rank}", run_dir))
        cleanup.callback(os.unlink, f"{path}{rank}")
        selector.register(listener, selectors.EVENT_READ, listener)
        own = os.memfd_create(f"{name}.{rank}")
        cleanup.callback(os.close, own)
        os.ftruncate(own, segment_bytes)

        links: dict[int, socket.socket] = {}
        segments = {rank: mmap.mmap(own, segment_bytes)}
        to_dial = set(range(rank))
        while len(segments) < world_size:
            connected = {peer: _dial(f"{path}{peer}") for peer in to_dial}
            new_links = [link for link in connected.values() if link]
            to_dial = {peer for peer, link in connected.items() if not link}
            for key, _ in selector.select(timeout=0.005):
                if key.data is listener:
                    new_links.append(listener.accept()[0])
                else:
                    selector.unregister(key.data)
                    peer, segments[peer] = _greet(key.data, hello, segment_bytes)
                    links[peer] = key.data
            for link in new_links:
                on_failure.enter_context(link).setblocking(False)
                socket.send_fds(link, [hello], [own])
                selector.register(link, selectors.EVENT_READ, link)
            if time.monotonic() > deadline:
                absent = set(range(world_size)) - set(segments)
                raise PeerError(f"{ranks_in_words(absent)} did not arrive within {timeout_s:g} s")
        on_failure.pop_all()
    return dict(sorted(links.items())), [segments[peer] for peer in range(world_size)]


def _check_private(run_dir: Path) -> None:
    status = run_dir.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ValueError(f"run_dir must be a directory of this user's with mode 0700, got {run_dir}")


def _listen(path: str, run_dir: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise
        used = run_dir / Path(path).name
        raise PeerError(f"{used} exists; give every group its own name and every run its own run_dir") from None
    listener.listen(socket.SOMAXCONN)
    return listener


def _dial(path: str) -> socket.socket | None:
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        link.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):  # the peer is not there yet, or does not listen yet
        link.close()
        return None
    return link


def _greet(link: socket.socket, hello: bytes, segment_bytes: int) -> tuple[int, mmap.mmap]:
    """Receives a peer's hello and its segment."""
    theirs, descriptors, _, _ = socket.recv_fds(link, HELLO.size, 1)
    if not theirs:
        raise ConnectionResetError
    try:
        peer, *shape = HELLO.unpack(theirs)
        _, *expected = HELLO.unpack(hello)
        if shape != expected:
            raise PeerError(f"rank {peer} has (world_size, buffer_bytes) {shape}, expected {expected}")
        return peer, mmap.mmap(descriptors[0], segment_bytes)
    finally:
        os.close(descriptors[0])
