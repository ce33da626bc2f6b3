"""The seam between the engine and its collectives: one interface, one implementation a backend.

A legend for the shapes: `W` ranks in the group, `T` rows of one rank, `...` any trailing dimensions, the same on
every rank; `sizes` holds the rows of every rank in rank order and is the same on every rank.

Who owns what. Inputs are only read, `broadcast` apart, and are the caller's again when the call returns. Results
are new tensors that share no memory with an input or with the communicator. The one exception is
`SingleRankCommunicator`, whose results are the inputs themselves: whoever writes a result in place must not need
the input any more.

Every rank of a group calls the same collectives in the same order, also with zero rows. Only when all ranks have
zero rows, as every one of them can see in `sizes`, nothing travels. A communicator serves one thread.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import torch
from torch import Tensor

SUMMABLE_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.int8,
)
"""The dtypes that can be reduced. Gathers and broadcasts move bytes and take any dtype."""

DIRECT_REDUCE_BYTES = 64 << 10
"""Up to here an all-reduce is one gather and every rank sums all of it; beyond, each rank sums a slice first."""

SUM_BLOCK = 128 << 10  # elements, so that the running sum stays in the cache

CPU = torch.device("cpu")

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """A peer died, did not arrive in time or entered another collective. The group is closed."""


class PeerError(Exception):
    """The reason alone, raised by an implementation; the base class adds collective, group and rank."""


class Communicator(ABC):
    """The collectives of one process group.

    The public methods check their arguments before anything is sent (ValueError), and turn a peer's failure into
    a CollectiveError. After one the ranks are out of step: the group is closed, and every later call is refused
    with the same reason. Implementations override `close` and the methods with an underscore.
    """

    def __init__(self, rank: int, world_size: int, name: str, device: torch.device = CPU) -> None:
        """`rank` and `world_size` are those within the group; `device` is where all its tensors live."""
        if not 0 <= rank < world_size:
            raise ValueError(f"group {name!r}: rank must be between 0 and {world_size - 1}, got {rank}")
        self.rank = rank
        self.world_size = world_size
        self.name = name
        self.device = device
        self._collective = ""
        self._closed_because: str | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, the same bits on each of them. Integers wrap around."""
        self._check_tensor("all_reduce", x)
        self._check_summable("all_reduce", x)
        if x.numel() == 0:
            return torch.empty_like(x)
        return self._run("all_reduce", self._all_reduce, x)

    def all_gather(self, x: Tensor) -> Tensor:  # [T, ...] -> [W*T, ...]
        """All ranks' rows in rank order; every rank brings the same number of them."""
        self._check_rows("all_gather", x)
        return self._gather("all_gather", (x,), (x.shape[0],) * self.world_size)[0]

    def prepare_all_gather(self, x: Tensor, output: Tensor) -> Callable[[], None]:
        """An `all_gather` of the same memory again and again: each call of what this returns is the collective.

        `x [T, ...]` is gathered into `output [W*T, ...]`; the caller keeps both.
        """
        for tensor in (x, output):
            self._check_rows("all_gather", tensor)
        expected = (x.shape[0] * self.world_size, *x.shape[1:])
        if output.shape != expected or output.dtype != x.dtype or not x.numel():
            raise self._refusal(
                "all_gather",
                f"cannot gather {tuple(x.shape)} {x.dtype} into {tuple(output.shape)} {output.dtype}, "
                f"expected {expected} of the same dtype, and not nothing",
            )
        return partial(self._run, "all_gather", self._prepare_all_gather(x, output))

    def reduce_scatter(self, x: Tensor) -> Tensor:  # [W*T, ...] -> [T, ...]
        """This rank's rows of the sum of `x` over all ranks."""
        self._check_rows("reduce_scatter", x)
        rows, rest = divmod(x.shape[0], self.world_size)
        if rest:
            raise self._refusal("reduce_scatter", f"rows must be a multiple of {self.world_size}, got {x.shape[0]}")
        return self._scatter("reduce_scatter", x, (rows,) * self.world_size)

    @overload
    def all_gatherv(self, x: Tensor, sizes: Sequence[int]) -> Tensor: ...
    @overload
    def all_gatherv(self, x: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]: ...
    def all_gatherv(self, x: Tensor | Sequence[Tensor], sizes: Sequence[int]) -> Tensor | list[Tensor]:
        """All ranks' rows in rank order: `[sizes[rank], ...]` becomes `[sum(sizes), ...]`.

        A sequence of tensors with the same rows, of any dtypes and widths, travels together and returns a list.
        """
        sizes = self._check_sizes("all_gatherv", sizes)
        tensors = (x,) if isinstance(x, Tensor) else tuple(x)
        if not tensors:
            raise self._refusal("all_gatherv", "expected at least one tensor, got none")
        for index, tensor in enumerate(tensors):
            self._check_rows("all_gatherv", tensor)
            if tensor.shape[0] != sizes[self.rank]:
                raise self._refusal(
                    "all_gatherv",
                    f"tensor {index} has {tensor.shape[0]} rows, expected sizes[{self.rank}] of {sizes}",
                )
        gathered = self._gather("all_gatherv", tensors, sizes)
        return gathered[0] if isinstance(x, Tensor) else gathered

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """This rank's rows of the sum over all ranks: `[sum(sizes), ...]` becomes `[sizes[rank], ...]`."""
        return self._scatter("reduce_scatterv", x, self._check_rows_of_all("reduce_scatterv", x, sizes))

    def all_to_allv(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """What `reduce_scatterv` adds up, of any dtype: this rank's rows of `x [sum(sizes), ...]` from every rank.

        Returns `[W * sizes[rank], ...]`, in the order of the ranks that they come from.
        """
        sizes = self._check_rows_of_all("all_to_allv", x, sizes)
        if not any(sizes):
            return torch.empty_like(x)
        return self._run("all_to_allv", self._all_to_allv, x, sizes)

    def broadcast(self, x: Tensor, src: int) -> None:
        """Overwrites `x`, of the same shape and dtype everywhere, with that of rank `src`."""
        self._check_tensor("broadcast", x)
        if not 0 <= src < self.world_size:
            raise self._refusal("broadcast", f"src must be between 0 and {self.world_size - 1}, got {src}")
        if x.numel():
            self._run("broadcast", self._broadcast, x, src)

    def barrier(self) -> None:
        """Returns once every rank has entered."""
        self._run("barrier", self._barrier)

    def synchronize(self, event: torch.cuda.Event | None = None) -> None:  # noqa: B027 - unless a backend has to wait
        """Returns once results may be read, or those from before the event: at once where they are done on return.

        Raises CollectiveError for what went wrong since the last time.
        """

    @abstractmethod
    def close(self) -> None:
        """Frees what the group holds; a peer in a collective sees this rank leave. May be called twice."""
        self._closed_because = self._closed_because or "the group was closed"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What implementations provide. Arguments are checked. _all_reduce and _broadcast get at least one element, the
    # others at least one row in all; sizes and trailing dimensions may hold zeros.

    def _all_reduce(self, x: Tensor) -> Tensor:
        """In terms of the two below, for backends that have nothing better."""
        flat = x.view(-1)
        if x.nbytes > DIRECT_REDUCE_BYTES:
            count, rest = divmod(x.numel(), self.world_size)
            sizes = tuple([count + (rank < rest) for rank in range(self.world_size)])
            return self._all_gatherv((self._reduce_scatterv(flat, sizes),), sizes)[0].view(x.shape)
        (terms,) = self._all_gatherv((flat,), (x.numel(),) * self.world_size)
        output = torch.empty_like(flat)
        sum_in_rank_order(terms.view(self.world_size, -1).unbind(), output)
        return output.view(x.shape)

    def _prepare_all_gather(self, x: Tensor, output: Tensor) -> Callable[[], None]:
        """For backends that have nothing better, which allocates at every call."""
        sizes = (x.shape[0],) * self.world_size

        def gather() -> None:
            output.copy_(self._all_gatherv((x,), sizes)[0])

        return gather

    @abstractmethod
    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]: ...

    @abstractmethod
    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor: ...

    @abstractmethod
    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor: ...

    @abstractmethod
    def _broadcast(self, x: Tensor, src: int) -> None: ...

    @abstractmethod
    def _barrier(self) -> None: ...

    def _gather(self, collective: str, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        if not any(sizes):
            return [torch.empty_like(tensor) for tensor in tensors]
        return self._run(collective, self._all_gatherv, tensors, sizes)

    def _scatter(self, collective: str, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        self._check_summable(collective, x)
        if not any(sizes):
            return torch.empty_like(x)
        return self._run(collective, self._reduce_scatterv, x, sizes)

    def _run(self, collective: str, implementation: Callable[..., T], *args: Any) -> T:
        if self._closed_because:
            raise CollectiveError(f"{self._where(collective)}: {self._closed_because}")
        self._collective = collective
        try:
            return implementation(*args)
        except PeerError as error:
            self._closed_because = f"{self._where(collective)}: {error}"
            self.close()
            raise CollectiveError(self._closed_because) from error
        except BaseException as error:
            # Left half-way (Ctrl-C, out of memory): the peers must see it, and no later call may be out of step.
            self._closed_because = f"{self._where(collective)} was interrupted by {type(error).__name__}"
            self.close()
            raise

    def _check_sizes(self, collective: str, sizes: Sequence[int]) -> tuple[int, ...]:
        sizes = tuple(sizes)
        if len(sizes) != self.world_size:
            raise self._refusal(collective, f"sizes has {len(sizes)} entries, expected {self.world_size}: {sizes}")
        if min(sizes) < 0:
            raise self._refusal(collective, f"sizes must not be negative, got {sizes}")
        return sizes

    def _check_rows_of_all(self, collective: str, x: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
        """The sizes, if they are those of `x`."""
        sizes = self._check_sizes(collective, sizes)
        self._check_rows(collective, x)
        if x.shape[0] != sum(sizes):
            raise self._refusal(collective, f"x has {x.shape[0]} rows, expected {sum(sizes)}, the sum of sizes {sizes}")
        return sizes

    def _check_tensor(self, collective: str, x: Tensor) -> None:
        if x.device != self.device:
            raise self._refusal(collective, f"expected a tensor on {self.device}, got one on {x.device}")
        if not x.is_contiguous():
            raise self._refusal(
                collective,
                f"expected a contiguous tensor, got shape {tuple(x.shape)} with strides {x.stride()}",
            )

    def _check_rows(self, collective: str, x: Tensor) -> None:
        self._check_tensor(collective, x)
        if x.dim() == 0:
            raise self._refusal(collective, "expected rows (at least one dimension), got a scalar")

    def _check_summable(self, collective: str, x: Tensor) -> None:
        if x.dtype not in SUMMABLE_DTYPES:
            raise self._refusal(collective, f"cannot sum {x.dtype}, expected one of {SUMMABLE_DTYPES}")

    def _refusal(self, collective: str, reason: str) -> ValueError:
        return ValueError(f"{self._where(collective)}: {reason}")

    def _where(self, collective: str) -> str:
        return f"{collective} in group {self.name!r}, rank {self.rank}"


class SingleRankCommunicator(Communicator):
    """A group of one: nothing travels and nothing is copied; results are the inputs themselves."""

    def __init__(self, name: str, device: torch.device = CPU) -> None:
        super().__init__(rank=0, world_size=1, name=name, device=device)

    def close(self) -> None:
        super().close()

    def _all_reduce(self, x: Tensor) -> Tensor:
        return x

    def _all_gatherv(self, tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[Tensor]:
        return list(tensors)

    def _reduce_scatterv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return x

    def _all_to_allv(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        return x

    def _broadcast(self, x: Tensor, src: int) -> None:
        pass

    def _barrier(self) -> None:
        pass


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Ascending: "rank 1", "ranks 1, 2 and 5"; there must be one."""
    *others, last = map(str, sorted(ranks))
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def sum_in_rank_order(terms: Sequence[Tensor], output: Tensor) -> None:
    """`output = terms[0] + terms[1] + ...`, in this order, all of one dtype and flat.

    fp16 and bf16 are added in fp32 and rounded once, so the result is the same whoever adds and how it is split.
    """
    if len(terms) == 1:
        output.copy_(terms[0])
    elif len(terms) == 2 or output.dtype not in (torch.float16, torch.bfloat16):
        torch.add(terms[0], terms[1], out=output)  # of two halves torch takes the sum in fp32, too
        for term in terms[2:]:
            output += term
    else:
        for begin in range(0, output.numel(), SUM_BLOCK):
            block = slice(begin, begin + SUM_BLOCK)
            total = terms[0][block].float()
            for term in terms[1:]:
                total += term[block]
            output[block] = total
