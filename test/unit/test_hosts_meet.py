"""Hosts find each other: who is welcome at the first one, who is told why not, and who costs it nothing more."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import AsyncMock, Mock

import pytest

import nibble
from config_cases import DP2, NVFP4, TWO_RANKS, resolved
from nibble.config.resolve import EngineConfig
from nibble.config.shared_settings import difference, shared_settings
from nibble.controller.async_engine import AsyncEngine
from nibble.controller.node_agent import serve_node
from nibble.controller.nodes import Nodes
from nibble.ipc.messages import StartProfile
from nibble.ipc.node_link import (
    FromNode,
    Goodbye,
    Hello,
    LinkError,
    NodeLink,
    OfRank,
    Steps,
    StillHere,
    ToNode,
    Welcome,
    heartbeat_seconds,
)
from nibble.utils.errors import ConfigError, OverloadedError
from rank_processes import free_port
from runners import engine_config

DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
LONG_S = 20.0


@pytest.fixture
def config(checkpoint) -> EngineConfig:
    """Of the first of two hosts."""
    return resolved(
        checkpoint(), **TWO_RANKS, nnodes=2, dist_init_addr=f"127.0.0.1:{free_port()}", startup_timeout=LONG_S
    )


class Meeting:
    """The first host, which waits for the other."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.on_message = AsyncMock()
        self.on_lost = Mock()
        self.nodes = Nodes(config, self.on_message, Mock(), self.on_lost)
        self.met = asyncio.ensure_future(self.nodes.meet())

    def hello(self, **changes: object) -> Hello:
        hello = Hello(1, nibble.__version__, shared_settings(self.config), self.config.context_length, 100)
        return Hello(**{name: getattr(hello, name) for name in hello.__struct_fields__} | changes)

    async def come(self, *said: FromNode) -> NodeLink[FromNode, ToNode]:
        host, port = str(self.config.args.dist_init_addr).split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        link: NodeLink[FromNode, ToNode] = NodeLink(reader, writer, ToNode)
        for message in said:
            link.send(message)
        return link


async def answer(link: NodeLink[FromNode, ToNode]) -> ToNode:
    while isinstance(message := await link.receive(LONG_S), StillHere):
        pass
    return message


@asynccontextmanager
async def waiting(config: EngineConfig) -> AsyncIterator[Meeting]:
    meeting = Meeting(config)
    while meeting.nodes._server is None:  # it does not listen yet
        await asyncio.sleep(0.01)
    yield meeting
    meeting.met.cancel()
    await meeting.nodes.stop(None, dump_stacks=False)


def run(config: EngineConfig, scenario: Callable[[Meeting], Awaitable[None]]) -> None:
    async def life() -> None:
        async with waiting(config) as meeting:
            await asyncio.wait_for(scenario(meeting), LONG_S)

    asyncio.run(life())


def test_hosts_serve_with_what_the_one_with_the_least_room_has(config):
    async def scenario(meeting: Meeting) -> None:
        link = await meeting.come(meeting.hello(context_length=64, num_pages=7))
        assert await answer(link) == Welcome(config.random_seed, 64, 7)
        met = await meeting.met
        assert (met.context_length, met.num_pages) == (64, 7)

    run(config, scenario)


def test_where_the_first_host_has_the_least_room_that_counts(config):
    async def scenario(meeting: Meeting) -> None:
        link = await meeting.come(meeting.hello(context_length=10**6, num_pages=10**6))
        assert await answer(link) == Welcome(config.random_seed, config.context_length, config.num_pages)

    run(config, scenario)


def test_a_host_that_comes_twice_is_told_so_and_changes_nothing(config):
    async def scenario(meeting: Meeting) -> None:
        impostor = await meeting.come(meeting.hello(node_rank=2))
        assert await answer(impostor) == Goodbye(
            "node 2 of 2 is none that is missing; of 2 nodes, [1] are", dump_stacks=False
        )
        link = await meeting.come(meeting.hello())
        assert isinstance(await answer(link), Welcome)

    run(config, scenario)


def test_a_host_that_goes_before_all_are_there_may_come_again(config):
    config = replace(config, parallel=replace(config.parallel, tp_size=3, dp_size=3, nnodes=3))

    async def scenario(meeting: Meeting) -> None:
        first = await meeting.come(meeting.hello())
        while meeting.nodes.missing() != [2]:
            await asyncio.sleep(0.01)
        await first.close()
        while meeting.nodes.missing() != [1, 2]:
            await asyncio.sleep(0.01)
        links = [await meeting.come(meeting.hello(node_rank=node)) for node in (2, 1)]
        for link in links:
            assert isinstance(await answer(link), Welcome)
        meeting.on_lost.assert_not_called()

    run(config, scenario)


def test_before_all_are_there_no_message_of_a_rank_is_taken_and_who_sends_one_is_cut_off(config):
    config = replace(config, parallel=replace(config.parallel, tp_size=3, dp_size=3, nnodes=3))

    async def scenario(meeting: Meeting) -> None:
        link = await meeting.come(meeting.hello(), OfRank(b"early"))
        with pytest.raises(LinkError, match="closed the connection"):
            await answer(link)
        meeting.on_message.assert_not_called()
        assert meeting.nodes.missing() == [1, 2]

    run(config, scenario)


def test_a_host_that_speaks_for_ranks_of_others_is_lost(config):
    async def scenario(meeting: Meeting) -> None:
        link = await meeting.come(meeting.hello())
        await meeting.met
        link.send(Steps({1: 5}, {1: "running"}))
        while not meeting.nodes.steps():
            await asyncio.sleep(0.01)
        link.send(Steps({0: 99}, {}))
        while not meeting.on_lost.called:
            await asyncio.sleep(0.01)
        meeting.on_lost.assert_called_once_with("node 1 is lost: it sent Steps out of turn")
        assert meeting.nodes.steps() == {1: 5}

    run(config, scenario)


def test_what_fails_while_messages_are_taken_ends_the_engine_and_not_its_hearing(config):
    async def scenario(meeting: Meeting) -> None:
        meeting.on_message.side_effect = KeyError("what failed")
        link = await meeting.come(meeting.hello())
        await meeting.met
        link.send(OfRank(b"message"))
        while not meeting.on_lost.called:
            await asyncio.sleep(0.01)
        assert "KeyError('what failed')" in meeting.on_lost.call_args.args[0]

    run(config, scenario)


def test_a_name_that_is_a_loopback_address_here_is_refused_before_others_look_for_it_in_vain(config, monkeypatch):
    """Debian's /etc/hosts gives the machine's own name 127.0.1.1."""
    port = config.args.dist_init_addr.split(":")[1]
    looked_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: looked_up("127.0.0.1", *args, **kwargs))

    async def scenario(address: str) -> None:
        meeting = Meeting(replace(config, args=replace(config.args, dist_init_addr=address)))
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(meeting.met, 0.5)
        finally:
            await meeting.nodes.stop(None, dump_stacks=False)

    with pytest.raises(ConfigError, match=r"node-a is 127\.0\.0\.1 on this host, .*; give the address that they use"):
        asyncio.run(scenario(f"node-a:{port}"))
    asyncio.run(scenario(f"localhost:{port}"))  # all on one machine


def test_once_all_are_there_nobody_else_can_connect(config):
    async def scenario(meeting: Meeting) -> None:
        link = await meeting.come(meeting.hello())
        assert isinstance(await answer(link), Welcome)
        with pytest.raises(ConnectionRefusedError):
            await meeting.come()

    run(config, scenario)


@pytest.mark.parametrize("dist_timeout", [0.2, 60.0])
def test_a_host_is_heard_several_times_within_the_timeout_after_which_it_counts_as_lost(config, dist_timeout):
    args = replace(config.args, dist_timeout=dist_timeout)
    assert heartbeat_seconds(args) <= min(1, dist_timeout / 10)


def test_where_the_first_host_does_not_come_the_other_says_so_with_the_reason(config):
    args = replace(config.args, node_rank=1, startup_timeout=0.3)
    with pytest.raises(ConfigError, match=r"nobody waits there .* --startup-timeout 0.3 s \(.*Errno 111.*\); is --n"):
        asyncio.run(serve_node(replace(config, args=args)))


def test_a_host_that_waits_ends_cleanly_with_a_server_that_is_told_to_stop(config):
    config = replace(config, parallel=replace(config.parallel, tp_size=3, dp_size=3, nnodes=3))

    async def scenario(meeting: Meeting) -> None:
        other = asyncio.ensure_future(serve_node(replace(config, args=replace(config.args, node_rank=1))))
        while meeting.nodes.missing() != [2]:
            await asyncio.sleep(0.01)
        await meeting.nodes.stop(None, dump_stacks=False)
        assert await other == 0

    run(config, scenario)


def test_hosts_that_come_while_the_first_one_gives_up_are_told_why(config):
    args = replace(config.args, model_path=str(DEMO_MODEL), nnodes=3, tp_size=3, dp_size=3)
    config = replace(
        config,
        args=args,
        tokenizer_folder=str(DEMO_MODEL),
        parallel=replace(config.parallel, tp_size=3, dp_size=3, nnodes=3),
    )

    async def scenario() -> None:
        engine = AsyncEngine(config)
        starting = asyncio.ensure_future(engine.start())
        hosts = [
            asyncio.ensure_future(serve_node(replace(config, args=replace(args, node_rank=node, page_size=page_size))))
            for node, page_size in ((1, 32), (2, 16))
        ]
        with pytest.raises(ConfigError, match="--page-size is 32 there"):
            await starting
        assert engine._nodes is not None
        while engine._nodes.missing():
            await asyncio.sleep(0.01)
        await engine.stop()
        for host in hosts:
            with pytest.raises(ConfigError, match="the first host says: node 1: --page-size is 32 there"):
                await host

    asyncio.run(scenario())


def test_a_profile_is_refused_until_the_ranks_are_there():
    async def ask() -> None:
        engine = AsyncEngine(engine_config(DEMO_MODEL))
        with pytest.raises(OverloadedError, match="is starting"):
            engine.start_profile(StartProfile(".", "x", None, ("CPU",), False, False))
        for _ in range(2):  # and the first refusal leaves nothing behind
            with pytest.raises(OverloadedError, match="is starting"):
                await engine.stop_profile()

    asyncio.run(ask())


def test_a_limit_of_the_cache_has_to_be_the_same_on_all_hosts(checkpoint):
    """One host's alone would count for nothing on GPUs, where the others leave it to what fits."""
    folder = checkpoint(quantization=NVFP4)
    ours, theirs = (shared_settings(resolved(folder, **DP2, max_total_tokens=tokens)) for tokens in (1024, 2048))
    assert difference(ours, theirs) == "--max-total-tokens is 2048 there, and 1024 on the first host"
