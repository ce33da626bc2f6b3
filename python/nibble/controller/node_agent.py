"""A host of an engine that is not the first: it starts its ranks, and carries messages between them and the first."""

import asyncio
import contextlib
import logging
import signal
from dataclasses import replace

import nibble
from nibble.config.resolve import EngineConfig
from nibble.config.server_args import parse_dist_init_addr
from nibble.config.shared_settings import shared_settings
from nibble.controller.host import Host
from nibble.ipc.messages import vocabulary_path
from nibble.ipc.node_link import (
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

_RETRY_SECONDS = 0.2

Link = NodeLink[FromNode, ToNode]


async def serve_node(config: EngineConfig) -> int:
    """Until the first host ends the engine, is lost, or a signal comes. The exit code: 0 if nothing has failed.

    Raises ConfigError when the first host can't be reached or refuses this one.
    """
    stopped = asyncio.get_running_loop().create_future()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _set, stopped, number)
    serving = asyncio.ensure_future(_Agent(config).run())
    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        return serving.result()
    logger.info("%s: this host leaves, and the engine ends with it", stopped.result().name)
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    return 0


def _set(future: "asyncio.Future[signal.Signals]", number: int) -> None:
    if not future.done():
        future.set_result(signal.Signals(number))


class _Agent:
    def __init__(self, config: EngineConfig) -> None:
        self._config, self._args = config, config.args
        self._ranks = config.parallel.ranks_of_node(self._args.node_rank)
        self._host: Host | None = None  # until all hosts are there

    async def run(self) -> int:
        link = await self._connect()
        config = self._config
        settings = shared_settings(config)
        link.send(Hello(self._args.node_rank, nibble.__version__, settings, config.context_length, config.num_pages))
        reporting = asyncio.ensure_future(self._report(link))
        try:
            if not await self._meet(link):
                logger.info("the first host stops before all are there")
                return 0
            return await self._serve(link)
        finally:
            reporting.cancel()
            await link.close()

    async def _connect(self) -> Link:
        """Whichever host is started first."""
        assert self._args.dist_init_addr is not None
        host, port = parse_dist_init_addr(self._args.dist_init_addr)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._args.startup_timeout
        logger.info("looking for the first host at %s", self._args.dist_init_addr)
        reason = "no answer"
        while loop.time() < deadline:
            try:
                async with asyncio.timeout_at(deadline):
                    reader, writer = await asyncio.open_connection(host, port)
                return NodeLink(reader, writer, ToNode)  # type: ignore[arg-type]
            except OSError as error:  # TimeoutError too, which says nothing
                reason = str(error) or reason
            await asyncio.sleep(_RETRY_SECONDS)
        raise ConfigError(
            f"--dist-init-addr {self._args.dist_init_addr}: nobody waits there for this host within --startup-timeout "
            f"{self._args.startup_timeout:g} s ({reason}); is --node-rank 0 running, or has it all its nodes already?"
        )

    async def _meet(self, link: Link) -> bool:
        """Waits for all hosts, and takes over what they serve with. False if the first one is told to stop before."""
        try:
            while isinstance(answer := await link.receive(self._args.dist_timeout), StillHere):
                pass
        except LinkError as error:
            raise ConfigError(f"the first host, at {self._args.dist_init_addr}, is lost: {error}") from error
        if isinstance(answer, Goodbye):
            if answer.reason is not None:
                raise ConfigError(f"the first host says: {answer.reason}")
            return False
        assert isinstance(answer, Welcome)
        self._config = replace(
            self._config,
            random_seed=answer.random_seed,
            context_length=answer.context_length,
            num_pages=answer.num_pages,
        )
        return True

    async def _serve(self, link: Link) -> int:
        host = self._host = Host(self._config, self._ranks, lambda rank, code: link.send(RankEnded(rank, code)))
        dump_stacks = False
        relaying = asyncio.ensure_future(self._relay(host, link))
        try:
            logger.info("all hosts are there; ranks %d to %d start", self._ranks[0], self._ranks[-1])
            host.start()
            goodbye = await self._obey(host, link)
            dump_stacks = goodbye.dump_stacks
            if goodbye.reason is not None:
                logger.error("the engine died: %s", goodbye.reason)
                return 1
            logger.info("the server is shutting down, and this host with it")
            return 0
        except LinkError as error:
            logger.error("the first host is lost: %s", error)
            return 1
        finally:
            relaying.cancel()
            await host.stop(dump_stacks)

    async def _obey(self, host: Host, link: Link) -> Goodbye:
        while True:
            message = await link.receive(self._args.dist_timeout)
            match message:
                case ForRank():
                    host.send(message.rank, message.message)
                case Vocabulary():
                    vocabulary_path(host.run_dir).write_bytes(message.content)
                case Goodbye():
                    return message
                case StillHere() | Welcome():
                    pass

    async def _relay(self, host: Host, link: Link) -> None:
        while True:
            link.send(OfRank(await host.receive()))

    async def _report(self, link: Link) -> None:
        while True:
            steps, states = (self._host.steps(), self._host.states()) if self._host else ([], {})
            link.send(Steps({rank: steps[rank] for rank in self._ranks if steps}, states))
            await asyncio.sleep(heartbeat_seconds(self._args))
