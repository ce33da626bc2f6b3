"""Groups of ranks on several hosts: they find each other at a store that rank 0 serves, and talk over gloo."""

import socket
from collections.abc import Sequence

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from nibble.config.resolve import EngineConfig
from nibble.config.server_args import parse_dist_init_addr
from nibble.distributed.communicator import CollectiveError, ranks_in_words
from nibble.distributed.gloo import GlooCommunicator, open_store, ranks_without_word
from nibble.utils.errors import ConfigError


class BetweenNodes:
    """One rank's connection to the store, which all its groups share."""

    def __init__(self, config: EngineConfig, rank: int) -> None:
        """Blocks until rank 0 serves the store, at most --dist-timeout.

        Raises CollectiveError if it does not, and ConfigError if --dist-init-addr is no address to meet at.
        """
        address, self._timeout_s = config.args.dist_init_addr, config.args.dist_timeout
        self._rank, self._world_size = rank, config.parallel.world_size
        self._startup_timeout_s = config.args.startup_timeout
        assert address is not None  # with several nodes
        host, port = parse_dist_init_addr(address)
        where = f"{f'[{host}]' if ':' in host else host}:{port + 1}"
        try:
            self._listen_address = host if config.parallel.node_of(rank) == 0 else _own_address_towards(host, port + 1)
            self._store = open_store(f"tcp://{where}", rank, config.parallel.world_size, self._timeout_s)
        except OSError as error:
            what = "listen" if rank == 0 else "be reached"
            raise ConfigError(
                f"--dist-init-addr {address}: rank 0 can't {what} at {where}, where the ranks meet: {error}; give an "
                "address of node 0, and a port that is free and the next one, too"
            ) from error
        except RuntimeError as error:
            raise CollectiveError(
                f"rank {rank} does not reach rank 0 at {where} (--dist-init-addr, and the next port) within "
                f"{self._timeout_s:g} s: {error}"
            ) from error

    def wait_for_all(self, what: str) -> None:
        """Returns when every rank of every host has called it with the same words, and waits as long as a start may
        take: hosts load at different speeds. Raises CollectiveError.
        """
        if absent := ranks_without_word(self._store, what, self._rank, self._world_size, self._startup_timeout_s):
            raise CollectiveError(f"{ranks_in_words(absent)}: {what} took longer than {self._startup_timeout_s:g} s")

    def join(self, name: str, address: str, members: Sequence[int]) -> GlooCommunicator:
        """The group of `members`; `address` is unique among the groups of all ranks."""
        place, store = members.index(self._rank), PrefixStore(address, self._store)
        return GlooCommunicator(place, len(members), store, name, self._timeout_s, self._listen_address)


def _own_address_towards(host: str, port: int) -> str:
    """The address of the interface through which packets leave for `host`. Nothing is sent. Raises OSError."""
    family, kind, protocol, _, destination = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(destination)
        own: str = probe.getsockname()[0]
    return own
