"""Collectives between GPUs over NCCL, on the caller's stream: the CUDA backend.

A call launches and returns; like any kernel it runs in the order of the current stream, and it can be captured in a
CUDA graph. So a peer that never comes is not seen by the call but by who waits: `synchronize` waits for the stream
with a deadline and must come before anything else that makes the host wait for a result (`.item()`, `.tolist()`,
`.cpu()`), which would wait for ever. Nothing else waits, and nothing but NCCL's own launch is added to a call.

Graphs are captured as usual, best with `capture_error_mode="thread_local"`, because NCCL's threads call CUDA, too.
Give them up before `close`: NCCL holds a communicator until every graph with its kernels is gone.
"""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from nibble.distributed.communicator import CollectiveError, Communicator, PeerError
from nibble.distributed.pynccl_wrapper import (
    PATH_VARIABLE,
    UNIQUE_ID_BYTES,
    Comm,
    DataType,
    NcclError,
    NcclLibrary,
    load_nccl,
)
from nibble.utils.deadline import within
from nibble.utils.errors import ConfigError

logger = logging.getLogger(__name__)

DATA_TYPES = {
    torch.int8: DataType.INT8,
    torch.uint8: DataType.UINT8,
    torch.int32: DataType.INT32,
    torch.int64: DataType.INT64,
    torch.float16: DataType.FLOAT16,
    torch.float32: DataType.FLOAT32,
    torch.float64: DataType.FLOAT64,
    torch.bfloat16: DataType.BFLOAT16,
}
"""Those of sums. What is only moved travels as bytes, so in any dtype, fp8 and bool among them."""

RELEASE_S = 2.0
"""How long `close`, or a failure, waits for NCCL to give its memory back before going on without. An abort ends the
kernels at once; what may take for ever is a CUDA graph that is still alive."""

CHANNELS_PER_GPU = 64
"""NCCL's kernels wait for each other, so those of all ranks of a GPU must run at once: a channel takes a
multiprocessor. 64 is what was measured to work on 132 of them; ranks with more than fit hang."""

T = TypeVar("T")


class PyNcclCommunicator(Communicator):
    """A group of processes with a GPU each, or with several on one GPU: see `multi_rank_gpu_environment`.

    Sums are NCCL's: the same bits on every rank, but the order of the terms is NCCL's choice and may change with
    the shape, and fp16 and bf16 may be rounded after each term.
    """

    def __init__(
        self,
        bootstrap: Communicator,
        name: str,
        timeout_s: float,
        device: torch.device,
        nccl: NcclLibrary | None = None,
        cuda: Any = torch.cuda,
    ) -> None:
        """Joins the group; returns when every rank has.

        `bootstrap` is a group of the same ranks on the CPU, which brings NCCL's unique id to all of them; rank and
        world size are its. It stays the caller's and is not needed afterwards. `timeout_s` limits the wait for the
        others, here and in `barrier` and `synchronize`. `nccl` and `cuda` are for tests.

        Raises ConfigError if there is no NCCL of a sufficient version, CollectiveError if the ranks do not meet.
        """
        # An allocation gives "cuda" its index, so that the device compares equal with that of tensors.
        self._token = torch.zeros(1, dtype=torch.uint8, device=device)
        super().__init__(bootstrap.rank, bootstrap.world_size, name, self._token.device)
        self._nccl = nccl or load_nccl()
        self._cuda = cuda
        self._timeout_s = timeout_s
        self._not_waited_for = 0  # collectives launched since `synchronize`
        self._watched: list[Callable[[], None]] = []
        self._companions: list[PyNcclCommunicator] = []
        try:
            self._comm: Comm | None = self._join(bootstrap)
        except (CollectiveError, NcclError) as error:
            raise CollectiveError(f"joining group {name!r}, rank {self.rank}: {error}") from error

    def _join(self, bootstrap: Communicator) -> Comm:
        unique_id = torch.zeros(UNIQUE_ID_BYTES, dtype=torch.uint8)
        if self.rank == 0:
            unique_id.copy_(torch.frombuffer(bytearray(self._nccl.get_unique_id()), dtype=torch.uint8))
        bootstrap.broadcast(unique_id, src=0)

        def init() -> Comm:
            self._cuda.set_device(self.device)
            return self._nccl.comm_init_rank(self.world_size, bytes(unique_id.tolist()), self.rank)

        try:
            return within(self._timeout_s, init)
        except TimeoutError:
            raise NcclError(f"a rank failed: ncclCommInitRank did not return within {self._timeout_s:g} s") from None

    def synchronize(self, event: torch.cuda.Event | None = None, timeout_s: float | None = None) -> None:
        """Waits until all work on the current stream is done, replayed CUDA graphs among it, or all before the event.

        A peer that died, did not arrive within `timeout_s` (by default that of the group) or entered another
        collective is a CollectiveError: the kernels that wait for it are ended, what they had to write is garbage,
        and the group is closed. The error names the newest collective and says how many it may be instead.
        """
        self._refuse_during_capture("synchronize")
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        super()._run(self._suspect("synchronize"), self._wait, timeout_s, event)

    def watch(self, raise_failure: Callable[[], None]) -> None:
        """Has `synchronize` and `check` call this, which raises PeerError once kernels that meet peers without NCCL
        have missed one.
        """
        self._watched.append(raise_failure)

    def take_along(self, other: "PyNcclCommunicator") -> None:
        """Has `synchronize` and `check` notice failures of `other`, with collectives on the same stream, and ends it
        with this group: then no kernel of either is left that waits.
        """
        self._companions.append(other)

    def check(self) -> None:
        """Raises CollectiveError, and closes the group, if NCCL noticed a failure by itself. Waits for nothing."""
        super()._run(self._suspect("check"), self._poll)

    def send(self, x: Tensor, dst: int) -> None:
        """Brings `x` to rank `dst`, which calls `recv` with the same shape and dtype.

        Two ranks that both have something to bring must not both send first.
        """
        self._check_peer("send", x, "dst", dst)
        if x.numel():
            self._run("send", self._send, x, dst)

    def recv(self, x: Tensor, src: int) -> None:
        """Overwrites `x` with what rank `src` sends."""
        self._check_peer("recv", x, "src", src)
        if x.numel():
            self._run("recv", self._recv, x, src)

    def barrier(self) -> None:
        self._refuse_during_capture("barrier")
        super().barrier()

    def close(self) -> None:
        """Ends after the GPU's work for the group; after a failure, which has ended that work, at once."""
        comm, self._comm = self._comm, None
        if comm is not None:
            release = self._nccl.comm_abort if self._closed_because else self._nccl.comm_destroy
            try:
                within(RELEASE_S, partial(release, comm))
            except TimeoutError:
                logger.warning(
                    "group %r, rank %d: NCCL still holds its communicator after %g s; a CUDA graph with its "
                    "collectives is alive, or work on the GPU hangs",
                    self.name, self.rank, RELEASE_S,
                )  # fmt: skip
            except NcclError as error:
                logger.warning("group %r, rank %d: %s", self.name, self.rank, error)
        self._not_waited_for = 0
        for companion in self._companions:
            companion._closed_because = companion._closed_because or self._closed_because
            companion.close()
        super().close()

    def _run(self, collective: str, implementation: Callable[..., T], *args: Any) -> T:
        self._not_waited_for += 1
        return super()._run(collective, implementation, *args)

    def _all_reduce(self, x: Tensor) -> Tensor:
        output = torch.empty_like(x)
        self._nccl.all_reduce(x.data_ptr(), output.data_ptr(), x.numel(), DATA_TYPES[x.dtype], *self._comm_and_stream())
        return output

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        outputs = [tensor.new_empty((sum(sizes), *tensor.shape[1:])) for tensor in tensors]
        where = self._comm_and_stream()
        with self._nccl.group():
            for tensor, output in zip(tensors, outputs, strict=True):
                if output.numel():
                    self._gather_rows(tensor, output, sizes, where)
        return outputs

    def _gather_rows(self, x: Tensor, output: Tensor, sizes: tuple[int, ...], where: tuple[Comm, int]) -> None:
        if min(sizes) == max(sizes):
            self._nccl.all_gather(x.data_ptr(), output.data_ptr(), x.nbytes, DataType.UINT8, *where)
        else:
            self._broadcast_rows(x, output, sizes, where)

    def _broadcast_rows(self, x: Tensor, output: Tensor, sizes: tuple[int, ...], where: tuple[Comm, int]) -> None:
        """One broadcast a root, to be called in a group: from NCCL 2.29 on a single kernel."""
        address, row_bytes = output.data_ptr(), output.nbytes // output.shape[0]
        for root, rows in enumerate(sizes):
            if rows:
                source = x.data_ptr() if root == self.rank else address
                self._nccl.broadcast(source, address, rows * row_bytes, DataType.UINT8, root, *where)
                address += rows * row_bytes

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        output = x.new_empty((sizes[self.rank], *x.shape[1:]))
        if x.numel() == 0:
            return output
        dtype, where = DATA_TYPES[x.dtype], self._comm_and_stream()
        if min(sizes) == max(sizes):
            self._nccl.reduce_scatter(x.data_ptr(), output.data_ptr(), output.numel(), dtype, *where)
            return output
        address, row_elements = x.data_ptr(), x.numel() // x.shape[0]
        with self._nccl.group():
            for root, rows in enumerate(sizes):
                if rows:
                    target = output.data_ptr() if root == self.rank else 0
                    self._nccl.reduce(address, target, rows * row_elements, dtype, root, *where)
                    address += rows * row_elements * x.itemsize
        return output

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        output = x.new_empty((self.world_size * sizes[self.rank], *x.shape[1:]))
        if x.numel() == 0:
            return output
        row_bytes, where = x.nbytes // x.shape[0], self._comm_and_stream()
        source, target, own_bytes = x.data_ptr(), output.data_ptr(), sizes[self.rank] * row_bytes
        with self._nccl.group():  # the rows for this rank itself are copied by the same kernel
            for peer, rows in enumerate(sizes):
                if rows:
                    self._nccl.send(source, rows * row_bytes, DataType.UINT8, peer, *where)
                if own_bytes:
                    self._nccl.recv(target, own_bytes, DataType.UINT8, peer, *where)
                source, target = source + rows * row_bytes, target + own_bytes
        return output

    def _broadcast(self, x: Tensor, src: int) -> None:
        self._nccl.broadcast(x.data_ptr(), x.data_ptr(), x.nbytes, DataType.UINT8, src, *self._comm_and_stream())

    def _send(self, x: Tensor, dst: int) -> None:
        self._nccl.send(x.data_ptr(), x.nbytes, DataType.UINT8, dst, *self._comm_and_stream())

    def _recv(self, x: Tensor, src: int) -> None:
        self._nccl.recv(x.data_ptr(), x.nbytes, DataType.UINT8, src, *self._comm_and_stream())

    def _barrier(self) -> None:
        address = self._token.data_ptr()
        self._nccl.all_reduce(address, address, 1, DataType.UINT8, *self._comm_and_stream())
        self._wait(self._timeout_s, None)

    def _comm_and_stream(self) -> tuple[Comm, int]:
        assert self._comm is not None  # a closed group refuses calls before they come here
        return self._comm, self._cuda.current_stream(self.device).cuda_stream

    def _wait(self, timeout_s: float, event: torch.cuda.Event | None) -> None:
        work = event if event is not None else self._cuda.current_stream(self.device)
        deadline = time.monotonic() + timeout_s
        while not work.query():
            self._poll()
            if time.monotonic() > deadline:
                raise PeerError(self._stuck(timeout_s))
            os.sched_yield()
        self._poll()
        self._not_waited_for = 0

    def _poll(self) -> None:
        assert self._comm is not None
        for raise_failure in self._watched:  # first: they know which peer is missing
            raise_failure()
        self._nccl.raise_async_error(self._comm)
        for companion in self._companions:
            try:
                companion.check()
            except CollectiveError as error:
                raise PeerError(str(error)) from error

    def _suspect(self, call: str) -> str:
        """What an error that `call` finds is attributed to."""
        return self._collective if self._not_waited_for else call

    def _stuck(self, timeout_s: float) -> str:
        if self._not_waited_for > 1:
            what = f"all of the last {self._not_waited_for} collectives"
        elif self._not_waited_for:
            what = "it"
        else:
            what = "a CUDA graph or other work"
        return (
            f"the GPU did not finish {what} within {timeout_s:g} s; a peer died, did not arrive or entered another "
            "collective"
        )

    def _refuse_during_capture(self, call: str) -> None:
        if self._cuda.is_current_stream_capturing():
            raise self._refusal(call, "a CUDA graph is being captured; wait after its replay")

    def _check_peer(self, call: str, x: Tensor, name: str, peer: int) -> None:
        self._check_tensor(call, x)
        if not 0 <= peer < self.world_size or peer == self.rank:
            raise self._refusal(call, f"{name} must be another rank between 0 and {self.world_size - 1}, got {peer}")


def multi_rank_gpu_environment(ranks_per_gpu: int) -> dict[str, str]:
    """The environment that NCCL needs in ranks which share GPUs, `ranks_per_gpu` on each. What is set stays as it is.

    Without NVIDIA's Multi-Process Service the kernels of such ranks take turns, and a collective takes milliseconds
    instead of microseconds. On GPUs with fewer than 64 multiprocessors set NCCL_MAX_NCHANNELS to a smaller number.

    Raises ConfigError if NCCL is too old to share a GPU.
    """
    # Registration of captured buffers has hung under load, and the copies it saves are small here.
    wanted = {"NCCL_GRAPH_REGISTER": "0"}
    if ranks_per_gpu > 1:
        nccl = load_nccl()
        if nccl.version < (2, 30, 0):
            raise ConfigError(
                f"{ranks_per_gpu} ranks on one GPU need NCCL 2.30 or newer, found {nccl.dotted_version} at "
                f"{nccl.path}: install a newer nvidia-nccl-cu12 or nvidia-nccl-cu13, set {PATH_VARIABLE} to another "
                "library, or start one rank a GPU"
            )
        wanted |= {
            "NCCL_MULTI_RANK_GPU_ENABLE": "1",
            "NCCL_NVLS_ENABLE": "0",  # NVLink multicast takes every GPU once
            "NCCL_MAX_NCHANNELS": str(max(1, CHANNELS_PER_GPU // ranks_per_gpu)),
        }
    return {name: value for name, value in wanted.items() if name not in os.environ}
