"""The other hosts of an engine, as the first one sees them."""

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace

import msgspec

import nibble
from nibble.config.resolve import EngineConfig
from nibble.config.server_args import parse_dist_init_addr
from nibble.config.shared_settings import difference, shared_settings, shortened
from nibble.ipc.node_link import (
    MAX_HELLO_BYTES,
    ForRank,
    FromNode,
    Goodbye,
    Hello,
    LinkError,
    NodeLink,
    OfRank,
    RankEnded,
    Steps,
    StillHere,
    ToNode,
    Vocabulary,
    Welcome,
    heartbeat_seconds,
)
from nibble.utils.errors import ConfigError

logger = logging.getLogger(__name__)

_HELLO_SECONDS = 10.0

Link = NodeLink[ToNode, FromNode]


class Nodes:
    """Belongs to one event loop. `--dist-init-addr` is where they connect, and nobody else should be able to."""

    def __init__(
        self,
        config: EngineConfig,
        on_message: Callable[[bytes], Awaitable[None]],
        on_exit: Callable[[int, int], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """`on_message` gets the messages of ranks, `on_exit` those that end by themselves; `on_lost` is told once a
        host is gone.
        """
        self._config, self._parallel = config, config.parallel
        self._settings = shared_settings(config)
        self._on_message, self._on_exit, self._on_lost = on_message, on_exit, on_lost
        self._links: dict[int, Link] = {}
        self._hellos: dict[int, Hello] = {}
        """The last one of each node."""
        self._arrived: asyncio.Queue[str | None] = asyncio.Queue()
        """For each node that has come, why it can't stay, if so."""
        self._steps: dict[int, int] = {}
        self._states: dict[int, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._have_met = False
        self._has_ended = False

    async def meet(self) -> EngineConfig:
        """Returns what all hosts serve with, once all are there. Raises ConfigError where they can't serve together."""
        address = self._config.args.dist_init_addr
        assert address is not None
        host, port = parse_dist_init_addr(address)
        try:
            self._server = await asyncio.start_server(self._on_connection, host, port)
        except OSError as error:
            raise ConfigError(
                f"--dist-init-addr {address}: can't listen there: {error.strerror}; it must be an address of the host "
                "of --node-rank 0, with a free port"
            ) from error
        self._check_reachable(host)
        self._start(self._keep_alive())
        while self.missing():
            logger.info("waiting for node %s at %s", ", ".join(map(str, self.missing())), address)
            if (refusal := await self._arrived.get()) is not None:
                raise ConfigError(refusal)
        self._have_met = True
        self._server.close()  # nobody else has business here
        everyone: list[EngineConfig | Hello] = [self._config, *self._hellos.values()]
        length, pages = min(host.context_length for host in everyone), [host.num_pages for host in everyone]
        num_pages = None if None in pages else min(page for page in pages if page is not None)
        self._send_to_all(Welcome(self._config.random_seed, length, num_pages))
        return replace(self._config, context_length=length, num_pages=num_pages)

    def _check_reachable(self, host: str) -> None:
        """A host's own name is often an address in 127.0.0.0/8 to itself."""
        assert self._server is not None
        own = self._server.sockets[0].getsockname()[0]
        if ipaddress.ip_address(own).is_loopback and host not in (own, "localhost"):
            raise ConfigError(
                f"--dist-init-addr {self._config.args.dist_init_addr}: {host} is {own} on this host, where no other "
                "one reaches it; give the address that they use"
            )

    def missing(self) -> list[int]:
        return [node for node in range(1, self._parallel.nnodes) if node not in self._links]

    def send(self, rank: int, message: bytes) -> None:
        self._links[self._parallel.node_of(rank)].send(ForRank(rank, message))

    def share_vocabulary(self, content: bytes) -> None:
        self._send_to_all(Vocabulary(content))

    def steps(self) -> dict[int, int]:
        """How many each of their ranks had made when the hosts last spoke."""
        return self._steps

    def states(self) -> dict[int, str]:
        """What the system said of their processes then."""
        return self._states

    async def stop(self, reason: str | None, dump_stacks: bool) -> None:
        """Ends them; `reason` if the engine has failed."""
        self._has_ended = True
        self._send_to_all(Goodbye(reason, dump_stacks))
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(link.close() for link in self._links.values()))

    async def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link: Link = NodeLink(reader, writer, FromNode)  # type: ignore[arg-type]
        host, *_ = writer.get_extra_info("peername") or ("somewhere",)
        try:
            hello = await link.receive(_HELLO_SECONDS, MAX_HELLO_BYTES)
            if not isinstance(hello, Hello):
                raise LinkError("it did not say hello")
            if hello.node_rank not in self.missing():
                who = f"node {hello.node_rank} of {hello.settings.get('--nnodes')}"
                reason = f"{who} is none that is missing; of {self._parallel.nnodes} nodes, {self.missing()} are"
                link.send(Goodbye(reason, dump_stacks=False))
                raise LinkError(reason)
        except LinkError as error:
            logger.warning("refused a connection from %s to --dist-init-addr: %s", host, error)
            await link.close()
            return
        self._links[hello.node_rank], self._hellos[hello.node_rank] = link, hello
        logger.info("node %d is here, from %s", hello.node_rank, host)
        self._start(self._read(hello.node_rank, link))
        refusal = self._why_not_together(hello)
        self._arrived.put_nowait(refusal and f"node {hello.node_rank}: {refusal}")

    def _why_not_together(self, hello: Hello) -> str | None:
        if hello.version != nibble.__version__:
            return f"it runs nibble {shortened(hello.version)}, and the first host {nibble.__version__}"
        if (what := difference(self._settings, hello.settings)) is not None:
            return f"{what}; start all hosts with the same flags, but for --node-rank, on machines of one kind"
        return None

    async def _read(self, node: int, link: Link) -> None:
        ranks = self._parallel.ranks_of_node(node)
        try:
            while True:
                message = await link.receive(self._config.args.dist_timeout)
                match message:
                    case Steps() if message.counts.keys() | message.states.keys() <= set(ranks):
                        self._steps |= message.counts
                        self._states |= message.states
                    case OfRank() if self._have_met:
                        await self._on_message(message.message)
                    case RankEnded() if self._have_met:
                        self._on_exit(message.rank, message.code)
                    case _:
                        raise LinkError(f"it sent {type(message).__name__} out of turn")
        except (LinkError, msgspec.DecodeError) as error:
            if not self._have_met:  # it may come again
                logger.warning("node %d is gone: %s", node, error)
                del self._links[node]
                await link.close()
            elif not self._has_ended:
                self._on_lost(f"node {node} is lost: {error}")

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(heartbeat_seconds(self._config.args))
            self._send_to_all(StillHere())

    def _send_to_all(self, message: ToNode) -> None:
        for link in self._links.values():
            link.send(message)

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._on_task_end)
        self._tasks.add(task)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_lost(f"the link to the other hosts failed: {error!r}")
