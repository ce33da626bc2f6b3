"""Memory of every rank that all ranks of the host read and write: what dispatch and combine go through without NCCL.

Where the ranks of a model are on several hosts, "all ranks" are here those of one of them.

A rank owns one segment: a header for meeting the others (`kernels/triton/peer_sync.py`), then the rows that all ranks
bring to it, then its partial results, which all ranks read. docs/peer_memory.md says why nobody writes what somebody
still reads.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nibble.config.resolve import EngineConfig
from nibble.distributed.communicator import CollectiveError, Communicator, PeerError
from nibble.distributed.cuda_ipc import HANDLE_BYTES, CudaIpc, CudaIpcError, as_tensor
from nibble.kernels.torch.fp8_row import Fp8RowLayout
from nibble.kernels.torch.wire_row import WireRowLayout
from nibble.kernels.triton.nvfp4_tiles import num_multiprocessors
from nibble.kernels.triton.peer_sync import (
    FAILURE_ADDRESS,
    HEADER_BYTES,
    MAX_RANKS,
    PATIENCE_NS,
    PEERS,
    mark_kernel,
    meet_kernel,
    read_marks_kernel,
)

_ALIGNMENT = 2 << 20  # pages of the GPU; memory that is cut otherwise is mapped in smaller ones, and read more slowly
_REASON_BYTES = 256
_TRIAL_S = 10.0
"""For the round that tries whether ranks meet; all have just come, and compiled what it needs."""


class PeerMemoryUnavailable(Exception):
    """Why the ranks cannot share memory; the same reason on every rank."""


@dataclass(frozen=True)
class SegmentLayout:
    """Where things are in a segment, for at most `max_rows` rows of all ranks of all hosts in one step."""

    max_rows: int
    row_bytes: int
    hidden_size: int
    fp8_partial: bool = False
    """Whether partial results are FP8 rows, not bf16."""
    rows_offset: int = field(init=False, default=HEADER_BYTES)
    partial_offset: int = field(init=False)
    partial_row_bytes: int = field(init=False)
    num_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        partial_offset = _align(self.rows_offset + self.max_rows * self.row_bytes)
        partial_row_bytes = Fp8RowLayout(self.hidden_size).row_bytes if self.fp8_partial else 2 * self.hidden_size
        object.__setattr__(self, "partial_offset", partial_offset)
        object.__setattr__(self, "partial_row_bytes", partial_row_bytes)
        object.__setattr__(self, "num_bytes", _align(partial_offset + self.max_rows * partial_row_bytes))


def segment_layout(config: EngineConfig) -> SegmentLayout:
    """For the largest step: on every rank a whole chunk of a prompt beside all other requests, or the largest graph."""
    model, args = config.model, config.args
    assert model.moe is not None
    most_rows = max(args.chunked_prefill_size + args.max_running_requests, *config.cuda_graph_rows, 0)
    fp4 = config.fp4_allgather.enabled
    row_bytes = WireRowLayout(model.hidden_size, model.moe.top_k).row_bytes if fp4 else 0
    fp8_partial = args.moe_combine_dtype == "fp8"
    return SegmentLayout(config.parallel.world_size * most_rows, row_bytes, model.hidden_size, fp8_partial)


class PeerMemory:
    """This rank's segment, and where the segments of all ranks are mapped. Ranks are counted from this host's first."""

    def __init__(
        self,
        rank: int,
        layout: SegmentLayout,
        segment: Tensor,
        addresses: Sequence[int],
        timeout_s: float,
        first_rank: int = 0,
    ) -> None:
        """`segment` is uint8 [layout.num_bytes], its header zero; `addresses` are those of all segments, by rank.

        A kernel waits at most `timeout_s` for the others. What is said of ranks names this host's first `first_rank`.
        """
        assert len(addresses) <= MAX_RANKS
        device = segment.device
        self.rank, self.world_size, self.first_rank = rank, len(addresses), first_rank
        self.layout, self.segment = layout, segment
        self._failure = torch.zeros(1, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.set_timeout(timeout_s)
        words = segment[:HEADER_BYTES].view(torch.int64)
        words[FAILURE_ADDRESS] = self._failure.data_ptr()  # pinned, so the same on the device
        words[PEERS : PEERS + self.world_size] = torch.tensor(addresses, device=device)
        self.num_multiprocessors = num_multiprocessors(device)
        self.teardown = ExitStack()
        """What `close` undoes."""

    def set_timeout(self, timeout_s: float) -> None:
        """For kernels that are launched from now on."""
        self.timeout_s = timeout_s
        self.segment[:HEADER_BYTES].view(torch.int64)[PATIENCE_NS] = int(timeout_s * 1e9)

    def fits(self, num_rows: int) -> bool:
        """Whether a step with this many rows on all ranks together can go through the memory."""
        return num_rows <= self.layout.max_rows

    def rows(self, num_rows: int, row_bytes: int) -> Tensor:
        """The first rows that all ranks have brought: uint8 [num_rows, row_bytes]."""
        self._check_fits(num_rows)
        assert row_bytes <= self.layout.row_bytes
        begin = self.layout.rows_offset
        return self.segment[begin : begin + num_rows * row_bytes].view(num_rows, row_bytes)

    def partial(self, num_rows: int) -> Tensor:
        """Where this rank's partial results of `num_rows` rows belong: bf16 [num_rows, H], or FP8 rows, uint8."""
        self._check_fits(num_rows)
        begin, row_bytes = self.layout.partial_offset, self.layout.partial_row_bytes
        partial = self.segment[begin : begin + num_rows * row_bytes].view(num_rows, row_bytes)
        return partial if self.layout.fp8_partial else partial.view(torch.bfloat16)

    def raise_failure(self) -> None:
        """Raises PeerError, with the ranks by name, if some did not come in time. Waits for nothing."""
        missing = int(self._failure.item())
        if missing:
            ranks = ", ".join(str(self.first_rank + rank) for rank in range(self.world_size) if missing >> rank & 1)
            raise PeerError(
                f"rank {ranks} did not arrive within {self.timeout_s:g} s in a dispatch or combine through peer memory"
            )

    def close(self) -> None:
        """Collective, unless a peer failed: memory is freed once nobody maps it. May be called twice."""
        if self.segment.device.type == "cuda":
            torch.cuda.synchronize(self.segment.device)
        self.teardown.close()

    def _check_fits(self, num_rows: int) -> None:
        if not self.fits(num_rows):
            raise ValueError(
                f"{num_rows} rows of all ranks in one step, and the peer memory was sized for {self.layout.max_rows}"
            )


def open_peer_memory(
    cpu_group: Communicator, device: torch.device, layout: SegmentLayout, timeout_s: float
) -> PeerMemory:
    """Allocates this rank's segment and maps those of all others. Collective.

    `cpu_group`, the same ranks on the CPU, brings the handles to them and stays open until the memory is closed.
    Raises PeerMemoryUnavailable, on all ranks alike, if one of them cannot reach another's memory, which each tries
    by writing into every segment, reading from it, and a round as dispatch and combine make it.
    """
    return _open(cpu_group, device, layout, timeout_s, first_rank=0)


def open_peer_memory_of_hosts(
    cpu_group: Communicator, all_hosts: Communicator, device: torch.device, layout: SegmentLayout, timeout_s: float
) -> PeerMemory:
    """That of the ranks of this host, `cpu_group`, if every host can open its own; otherwise all hosts do without.

    `all_hosts`: the ranks of all hosts, on the CPU, host by host in the order of `cpu_group`.
    """
    with ExitStack() as teardown:
        memory, failure = None, ""
        try:
            memory = _open(cpu_group, device, layout, timeout_s, all_hosts.rank - cpu_group.rank)
            teardown.callback(memory.close)
        except PeerMemoryUnavailable as error:
            failure = str(error)
        if found := _first_failure(all_hosts, failure):
            raise PeerMemoryUnavailable(found[1])
        teardown.pop_all()
    assert memory is not None
    return memory


def _open(
    cpu_group: Communicator, device: torch.device, layout: SegmentLayout, timeout_s: float, first_rank: int
) -> PeerMemory:
    if cpu_group.world_size > MAX_RANKS:
        raise PeerMemoryUnavailable(f"{cpu_group.world_size} ranks are more than the {MAX_RANKS} that it is made for")
    with ExitStack() as teardown:
        cuda, own, handle = _allocate(cpu_group, first_rank, device, layout.num_bytes, teardown)
        teardown.callback(_wait_for_all, cpu_group)  # before this rank frees what others map
        addresses = _map_all(cpu_group, first_rank, cuda, own, handle, teardown)
        segment = as_tensor(own, layout.num_bytes, device)
        memory = PeerMemory(cpu_group.rank, layout, segment, addresses, timeout_s, first_rank)
        _try_out(cpu_group, memory)
        memory.teardown.push(teardown.pop_all())
    return memory


def _allocate(
    cpu_group: Communicator, first_rank: int, device: torch.device, num_bytes: int, teardown: ExitStack
) -> tuple[CudaIpc, int, Tensor]:
    """The driver, the address of this rank's segment, its header zero, and its handle as bytes."""
    cuda, own, handle, failure = None, 0, bytes(HANDLE_BYTES), ""
    try:
        cuda = CudaIpc()
        own = cuda.allocate(num_bytes)
        teardown.callback(cuda.free, own)
        handle = cuda.export(own)
        as_tensor(own, HEADER_BYTES, device).zero_()
        torch.cuda.synchronize(device)
    except (CudaIpcError, RuntimeError) as error:
        failure = str(error)
    _agree(cpu_group, first_rank, failure)
    assert cuda is not None
    return cuda, own, torch.frombuffer(bytearray(handle), dtype=torch.uint8)


def _map_all(
    cpu_group: Communicator, first_rank: int, cuda: CudaIpc, own: int, handle: Tensor, teardown: ExitStack
) -> list[int]:
    """The addresses of all segments, by rank."""
    handles = cpu_group.all_gather(handle.view(1, HANDLE_BYTES))
    addresses, failure = [], ""
    for rank in range(cpu_group.world_size):
        if rank == cpu_group.rank:
            addresses.append(own)
            continue
        try:
            addresses.append(cuda.open(bytes(handles[rank].tolist())))
            teardown.callback(cuda.close, addresses[-1])
        except CudaIpcError as error:
            failure = f"the memory of rank {first_rank + rank} cannot be mapped: {error}"
            break
    _agree(cpu_group, first_rank, failure)
    return addresses


def _try_out(cpu_group: Communicator, memory: PeerMemory) -> None:
    """Marks in every segment, then looks for the marks of all ranks in the own and in every other, then a round."""
    timeout_s = memory.timeout_s
    memory.set_timeout(min(timeout_s, _TRIAL_S))
    for attempt in (_leave_marks, _why_out_of_reach, _why_not_met):
        _agree(cpu_group, memory.first_rank, _failure_of(attempt, memory))
    memory.set_timeout(timeout_s)


def _leave_marks(memory: PeerMemory) -> str:
    mark_kernel[(1,)](memory.segment, memory.rank, WORLD_SIZE=memory.world_size, num_warps=1)
    meet_kernel.warmup(memory.segment, memory.rank, WORLD_SIZE=memory.world_size, num_warps=1, grid=(1,))
    torch.cuda.synchronize(memory.segment.device)
    return ""


def _why_out_of_reach(memory: PeerMemory) -> str:
    found = torch.zeros(memory.world_size, 2, dtype=torch.int64, device=memory.segment.device)
    read_marks_kernel[(1,)](memory.segment, found, WORLD_SIZE=memory.world_size, num_warps=1)
    own_name = memory.first_rank + memory.rank
    for rank, (written, read) in enumerate(found.tolist()):
        name = memory.first_rank + rank
        if written != rank + 1:
            return f"what rank {name} wrote into the memory of rank {own_name} did not arrive"
        if read != rank + 1:
            return f"what rank {own_name} read from the memory of rank {name} is not what is there"
    return ""


def _why_not_met(memory: PeerMemory) -> str:
    meet_kernel[(1,)](memory.segment, memory.rank, WORLD_SIZE=memory.world_size, num_warps=1)
    torch.cuda.synchronize(memory.segment.device)
    memory.raise_failure()
    return ""


def _failure_of(attempt: Callable[[PeerMemory], str], memory: PeerMemory) -> str:
    """Why it failed, by result or by error: whatever a kernel does on one rank, the others are told."""
    try:
        return attempt(memory)
    except (PeerError, CudaIpcError) as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _agree(cpu_group: Communicator, first_rank: int, failure: str) -> None:
    """Raises the first rank's failure on every rank."""
    if found := _first_failure(cpu_group, failure):
        rank, reason = found
        raise PeerMemoryUnavailable(f"rank {first_rank + rank}: {reason}")


def _first_failure(cpu_group: Communicator, failure: str) -> tuple[int, str] | None:
    """The first rank that has one, and which, the same on every rank."""
    text = torch.zeros(1, _REASON_BYTES, dtype=torch.uint8)
    encoded = failure.encode()[:_REASON_BYTES]
    text[0, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    for rank, row in enumerate(cpu_group.all_gather(text)):
        if reason := bytes(row.tolist()).rstrip(b"\0").decode(errors="replace"):
            return rank, reason
    return None


def _wait_for_all(cpu_group: Communicator) -> None:
    with suppress(CollectiveError):  # then the others are gone
        cpu_group.barrier()


def _align(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
