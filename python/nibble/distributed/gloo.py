"""Collectives over gloo: TCP between processes, on one host or several. The general CPU backend.

Every group is a gloo process group of its own; the default group of torch.distributed is neither used nor set.
"""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from nibble.distributed.communicator import (
    CollectiveError,
    Communicator,
    PeerError,
    ranks_in_words,
    sum_in_rank_order,
)
from nibble.utils.deadline import within

NAMING_S = 1.0
"""How long a rank whose collective failed waits for its peers to notice, so that it can name the one that did not."""

ProcessGroupGloo: Any = torch.distributed.ProcessGroupGloo  # its type stubs lack the collectives


class GlooCommunicator(Communicator):
    """A group of processes that reach each other by TCP. Sums are those of `sum_in_rank_order`, not gloo's own.

    A rank that fails lets go of its connections when its process ends; until then peers may wait for their deadline.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store | str,
        name: str,
        timeout_s: float,
        listen_address: str = "127.0.0.1",
    ) -> None:
        """Joins the group; returns when every rank has.

        `store` is where the ranks find each other: a torch.distributed store, which several groups may share, or
        an address for `open_store`. `name` is unique among the groups of a store. `listen_address` is the address
        or host name at which the peers reach this rank. A rank waits at most `timeout_s` for the others, here and
        in every collective.
        """
        super().__init__(rank, world_size, name)
        self._timeout_s = timeout_s
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        try:
            with self._peer_errors():
                if isinstance(store, str):
                    store = open_store(store, rank, world_size, timeout_s)
                options._devices = [ProcessGroupGloo.create_device(hostname=listen_address)]
                self._store = PrefixStore(name, store)
                # gloo would not say who is missing.
                if absent := ranks_without_word(self._store, "here", rank, world_size, timeout_s):
                    raise PeerError(f"{ranks_in_words(absent)} did not arrive within {timeout_s:g} s")
                self._gloo = ProcessGroupGloo(self._store, rank, world_size, options)
        except PeerError as error:
            raise CollectiveError(f"joining group {name!r}, rank {rank}: {error}") from error

    def close(self) -> None:
        if not self._closed_because:
            del self._gloo  # disconnects, but waits for operations on their way: after a failure, for the deadline
        super().close()

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        if len(tensors) == 1:
            return [self._gather_rows(tensors[0], sizes)]
        # Side by side as bytes, [T, all widths], because every broadcast costs a round of messages.
        parts = [_rows_as_bytes(tensor) for tensor in tensors]
        rows = self._gather_rows(torch.cat(parts, dim=1), sizes)
        outputs = [tensor.new_empty((rows.shape[0], *tensor.shape[1:])) for tensor in tensors]
        columns = rows.split([part.shape[1] for part in parts], dim=1)
        for output, column in zip(outputs, columns, strict=True):
            _rows_as_bytes(output).copy_(column)
        return outputs

    def _prepare_all_gather(self, x: Tensor, output: Tensor) -> Callable[[], None]:
        def gather() -> None:
            with self._peer_errors():
                self._gloo._allgather_base(_as_bytes(output), _as_bytes(x)).wait()

        return gather

    def _gather_rows(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        output = x.new_empty((sum(sizes), *x.shape[1:]))
        if output.numel() == 0:
            return output
        with self._peer_errors():
            if min(sizes) == max(sizes):
                self._gloo._allgather_base(_as_bytes(output), _as_bytes(x)).wait()
                return output
            # gloo has no gather of uneven sizes: every rank broadcasts its rows, all at once.
            parts = output.split(sizes)
            parts[self.rank].copy_(x)
            works = [self._gloo.broadcast(_as_bytes(part), root) for root, part in enumerate(parts) if len(part)]
            for work in works:
                work.wait()
        return output

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        # Every rank sends each peer the peer's rows and sums what it gets. gloo's reduce_scatter takes two to
        # eight times as long.
        output = x.new_empty((sizes[self.rank], *x.shape[1:]))
        terms = self._all_to_allv(x, sizes).view(self.world_size, output.numel())
        sum_in_rank_order(terms.unbind(), output.view(-1))
        return output

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        output = x.new_empty((self.world_size * sizes[self.rank], *x.shape[1:]))
        width = x.nbytes // x.shape[0]
        if width:
            received, sent = [sizes[self.rank] * width] * self.world_size, [rows * width for rows in sizes]
            with self._peer_errors():
                self._gloo.alltoall_base(_as_bytes(output), _as_bytes(x), received, sent).wait()
        return output

    def _broadcast(self, x: Tensor, src: int) -> None:
        with self._peer_errors():
            self._gloo.broadcast(_as_bytes(x), src).wait()

    def _barrier(self) -> None:
        with self._peer_errors():
            self._gloo.barrier().wait()

    @contextmanager
    def _peer_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = re.sub(r"^\[\S+\] ", "", str(error))  # gloo begins with the place in its own source
            raise PeerError(f"{reason} (the limit is {self._timeout_s:g} s){self._silent_peers()}") from error

    def _silent_peers(self) -> str:
        """Names the peers that do not fail, too: gloo only knows that somebody did not come."""
        if not hasattr(self, "_gloo"):
            return ""  # while joining
        # The store goes with the rank that serves it, or no longer answers with the host that it is on.
        with suppress(RuntimeError, TimeoutError):
            words = self._store, "failed", self.rank, self.world_size, NAMING_S
            if silent := within(2 * NAMING_S, lambda: ranks_without_word(*words)):
                return f"; no word from {ranks_in_words(silent)}"
        return ""


def ranks_without_word(store: Store, word: str, rank: int, world_size: int, timeout_s: float) -> set[int]:
    """Leaves a word of this rank at the store. Returns those that have not left theirs in time."""
    store.set(f"{word}.{rank}", "")
    words = {peer: f"{word}.{peer}" for peer in range(world_size) if peer != rank}
    deadline = time.monotonic() + timeout_s
    while not store.check(list(words.values())):  # one question for all: they may be many, and the store one
        if time.monotonic() > deadline:
            return {peer for peer, key in words.items() if not store.check([key])}
        time.sleep(0.01)
    return set()


def open_store(address: str, rank: int, world_size: int, timeout_s: float) -> Store:
    """The store at `file:///path`, for one host, or `tcp://host:port`, which rank 0 serves at that address only."""
    parts = urlsplit(address)
    if parts.scheme == "file" and not parts.netloc and parts.path:
        return FileStore(parts.path, world_size)
    if parts.scheme != "tcp" or not parts.hostname or not parts.port:
        raise ValueError(f"the store's address must be file:///path or tcp://host:port, got {address!r}")
    listener = None
    if rank == 0:
        # Left to itself the store would listen on every interface.
        family = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((parts.hostname, parts.port), family=family).detach()
    return TCPStore(
        parts.hostname,
        parts.port,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener,
    )


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _rows_as_bytes(x: Tensor) -> Tensor:  # [T, ...] -> [T, bytes of a row]
    return x.unsqueeze(-1).flatten(1).view(torch.uint8)
