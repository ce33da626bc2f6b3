"""Ranks on several hosts: which flags say so, which ranks are where, and what each has of its host."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from unittest.mock import Mock

import psutil
import pytest
import torch
from torch.distributed import HashStore

from config_cases import DP2, MOE, NVFP4, TWO_RANKS, machine, on_a_gpu, refused, resolved
from nibble.config.command_line import parse_server_args
from nibble.config.resolve import EngineConfig
from nibble.config.server_args import parse_dist_init_addr
from nibble.distributed import gloo
from nibble.distributed.between_nodes import BetweenNodes
from nibble.distributed.communicator import CollectiveError
from nibble.distributed.gloo import GlooCommunicator
from nibble.distributed.parallel_state import _Meeting
from nibble.utils.capability import Capability
from nibble.utils.errors import ConfigError
from rank_processes import free_port

TWO_NODES = {"nnodes": 2, "dist_init_addr": "node0:5000"}
FOUR_RANKS = {**TWO_RANKS, **dict.fromkeys(("tp_size", "dp_size", "ep_size"), 4)}


def test_flags_have_sglangs_names():
    args = parse_server_args("--model-path m --nnodes 2 --node-rank 1 --dist-init-addr 10.0.0.1:5000".split())
    assert (args.nnodes, args.node_rank, args.dist_init_addr) == (2, 1, "10.0.0.1:5000")


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"nnodes": 0}, "--nnodes must be greater than 0, got 0"),
        ({"nnodes": 2}, "--nnodes 2 needs --dist-init-addr"),
        ({"dist_init_addr": "node0:5000"}, "--dist-init-addr node0:5000: one node meets no other; leave it out"),
        ({"node_rank": 1}, "--node-rank must be at least 0 and below --nnodes 1, got 1"),
        ({**TWO_NODES, "node_rank": 2}, "below --nnodes 2, got 2"),
        ({**TWO_NODES, "node_rank": -1}, "below --nnodes 2, got -1"),
    ],
)
def test_flags_that_say_nothing_or_too_little_are_refused(checkpoint, args, reason):
    assert reason in refused(checkpoint(), **args)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("node0:5000", ("node0", 5000)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("[fd00::2]:65534", ("fd00::2", 65534)),
    ],
)
def test_an_address_to_meet_at_is_a_host_and_a_port(address, expected):
    assert parse_dist_init_addr(address) == expected


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("node0", "must be HOST:PORT or [IPv6]:PORT, got 'node0'"),
        (":5000", "must be HOST:PORT"),
        ("node0:http", "must be HOST:PORT"),
        ("tcp://node0:5000", "must be HOST:PORT"),
        ("fd00::2:5000", "must be HOST:PORT or [IPv6]:PORT"),
        ("[node0]:5000", "'node0' does not appear to be an IPv4 or IPv6 address"),
        ("node0:0", "the port must be between 1 and 65534; the next one is used, too"),
        ("node0:65535", "the port must be between 1 and 65534"),
        ("0.0.0.0:5000", "no node is reached at 0.0.0.0; give the address of node 0"),
        ("[::]:5000", "no node is reached at ::"),
    ],
)
def test_what_is_no_address_to_meet_at_is_refused_before_anything_else(tmp_path, address, reason):
    assert reason in refused(tmp_path, nnodes=2, dist_init_addr=address)


@pytest.mark.parametrize(
    ("sizes", "nnodes", "reason"),
    [
        ((4, 4), 3, "--nnodes 3 must divide --tp-size 4, the ranks of all nodes; possible: [1, 2, 4]"),
        ((4, 2), 4, "(here of 2 ranks: --tp-size divided by --dp-size) lies on one node; possible: [1, 2], or raise"),
        ((4, 1), 2, "--nnodes 2 must divide --dp-size 1"),
    ],
)
def test_nodes_that_would_cut_an_attention_group_are_refused_with_the_fix(checkpoint, sizes, nnodes, reason):
    tp, dp = sizes
    args = {"tp_size": tp, "dp_size": dp, "enable_dp_attention": True, "nnodes": nnodes, "dist_init_addr": "node0:5000"}
    assert reason in refused(checkpoint(), **args)


@pytest.mark.parametrize(
    ("tp", "dp", "nnodes"), [(tp, dp, n) for tp in (1, 2, 4) for dp in (1, 2, 4) for n in (1, 2, 4) if dp <= tp]
)
def test_an_attention_group_lies_on_one_node_or_the_nodes_are_refused(checkpoint, tp, dp, nnodes):
    args = {"tp_size": tp, "dp_size": dp, "enable_dp_attention": True, "nnodes": nnodes}
    args |= {"dist_init_addr": "node0:5000"} if nnodes > 1 else {}
    folder = checkpoint()
    if tp % nnodes or (tp // nnodes) % (tp // dp):
        assert f"--nnodes {nnodes} must divide" in refused(folder, **args)
        return
    parallel = resolved(folder, **args).parallel
    nodes = [parallel.ranks_of_node(node) for node in range(nnodes)]
    assert [rank for ranks in nodes for rank in ranks] == list(range(tp))
    for node, ranks in enumerate(nodes):
        assert [parallel.index_on_node(rank) for rank in ranks] == list(range(tp // nnodes))
        for rank in ranks:
            assert parallel.node_of(rank) == node
            assert set(parallel.attn_tp_ranks(rank)) <= set(ranks)


# Shares of a host


def test_the_ranks_of_a_node_share_its_cores_and_memory(checkpoint, monkeypatch):
    monkeypatch.setattr("nibble.config.resolve.available_memory_bytes", lambda: 2**24)
    found = Capability((0, 1, 2, 3), 0, None, False, False, False)
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: found)
    budget = {"max_running_requests": 10**6, "context_length": 32}
    on_two_hosts, on_one = (
        resolved(checkpoint(), **args, **budget) for args in ({**FOUR_RANKS, **TWO_NODES}, TWO_RANKS)
    )
    assert on_two_hosts.cpu_threads == on_one.cpu_threads == 2
    assert on_two_hosts.rank_cores == on_one.rank_cores == ((0, 1), (2, 3))
    assert on_two_hosts.num_pages == on_one.num_pages is not None


@pytest.mark.parametrize(
    ("gpus", "shared", "devices"), [(1, 2, [0, 0, 0, 0]), (2, 1, [0, 1, 0, 1]), (8, 1, [0, 1] * 2)]
)
def test_the_ranks_of_a_node_share_its_gpus(checkpoint, monkeypatch, tmp_path, gpus, shared, devices):
    monkeypatch.setattr("nibble.config.resolve.capability", lambda: machine(gpus))
    config = resolved(checkpoint(), **FOUR_RANKS, **TWO_NODES)
    assert (config.num_gpus, config.ranks_per_gpu) == (min(gpus, 2), shared)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [_Meeting(config, rank, tmp_path).device.index for rank in range(4)] == devices


def test_the_log_says_which_ranks_are_on_which_node_and_how_they_meet(checkpoint, monkeypatch):
    several = {**FOUR_RANKS, **TWO_NODES}
    assert (
        "ranks of node 0: 0 to 1, node 1: 2 to 3; between nodes: gloo" in resolved(checkpoint(), **several).decisions()
    )
    dense = {**several, "ep_size": 1}
    folder = checkpoint({**MOE, "architectures": ["Qwen3ForCausalLM"]}, num_experts=None)
    assert "between nodes: nothing" in " ".join(resolved(folder, **dense).decisions())
    assert "node 0" not in " ".join(resolved(checkpoint(), **TWO_RANKS).decisions())
    on_a_gpu(monkeypatch)
    assert "between nodes: nccl, and gloo for" in " ".join(resolved(checkpoint(), **several).decisions())


def test_rows_go_through_peer_memory_inside_each_node_and_nccl_between_them(checkpoint, monkeypatch):
    on_a_gpu(monkeypatch)
    for asked in ("auto", "peer"):
        config = resolved(checkpoint(quantization=NVFP4), moe_comm_backend=asked, **FOUR_RANKS, **TWO_NODES)
        assert config.moe_comm_backend == "peer"
        words = "through peer memory, if every rank can reach that of all others of its host, and nccl between hosts"
        assert f"rows to the experts and back: {words}" in config.decisions()
    config = resolved(checkpoint(quantization=NVFP4), moe_comm_backend="nccl", **FOUR_RANKS, **TWO_NODES)
    assert config.moe_comm_backend == "nccl"


def test_nodes_of_one_rank_take_nccl(checkpoint, monkeypatch):
    on_a_gpu(monkeypatch)
    folder = checkpoint(quantization=NVFP4)
    reason = "peer memory reaches the ranks of one host, and every node has one rank"
    config = resolved(folder, **DP2, **TWO_NODES)
    assert config.moe_comm_backend == "nccl"
    assert f"rows to the experts and back: nccl ({reason})" in config.decisions()
    message = refused(folder, moe_comm_backend="peer", **DP2, **TWO_NODES)
    assert message == f"--moe-comm-backend peer: {reason}; use nccl or auto"


# Meeting


@pytest.fixture
def two_nodes(checkpoint):
    """One rank on each of two nodes that meet on this host; nobody listens yet."""

    def configure(host: str = "127.0.0.1", port: int | None = None) -> EngineConfig:
        address = f"{f'[{host}]' if ':' in host else host}:{(port or free_port()) - 1}"
        return resolved(checkpoint(), **TWO_RANKS, nnodes=2, dist_init_addr=address, dist_timeout=0.5)

    return configure


def test_a_node_that_does_not_come_in_time_is_named_by_its_ranks(two_nodes):
    with pytest.raises(CollectiveError, match=r"^joining group 'tp', rank 0: rank 1 did not arrive within 0.5 s$"):
        BetweenNodes(two_nodes(), rank=0).join("tp", "tp0", range(2))


def test_hosts_may_load_for_longer_than_a_collective_may_take_but_not_than_a_start(two_nodes):
    config = two_nodes()
    config = replace(config, args=replace(config.args, dist_timeout=1.0, startup_timeout=20.0))
    with ThreadPoolExecutor(2) as ranks:
        first, second = ranks.map(lambda rank: BetweenNodes(config, rank), range(2))
        waiting = ranks.submit(first.wait_for_all, "loading weights")
        time.sleep(1.2)
        assert not waiting.done()
        second.wait_for_all("loading weights")
        waiting.result()
        first._startup_timeout_s = 0.2
        with pytest.raises(CollectiveError, match=r"^rank 1: measuring took longer than 0\.2 s$"):
            first.wait_for_all("measuring")


def test_where_rank_0_does_not_answer_the_error_says_so_with_its_address(two_nodes):
    port = free_port()
    with pytest.raises(CollectiveError, match=rf"^rank 1 does not reach rank 0 at 127.0.0.1:{port} \(--dist-init-addr"):
        BetweenNodes(two_nodes(port=port), rank=1)


@pytest.mark.parametrize("host", ["192.0.2.1", "::2"])
def test_an_address_of_another_host_is_refused_on_node_0(two_nodes, host):
    """Both are nobody's: of a network for documentation, and unassigned."""
    with pytest.raises(ConfigError, match=r"--dist-init-addr .*: rank 0 can't listen at .*give an address of node 0"):
        BetweenNodes(two_nodes(host), rank=0)


def test_a_port_that_is_taken_is_refused_on_node_0(two_nodes):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"127.0.0.1:{port}, where the ranks meet: .*in use.*a port that is free"
        ):
            BetweenNodes(two_nodes(port=port), rank=0)


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


NO_IPV6 = pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this host has no IPv6")


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=NO_IPV6)])
def test_ranks_listen_only_at_the_address_where_the_nodes_meet_and_at_that_of_the_way_there(two_nodes, host):
    config, before = two_nodes(host), listening()
    with ThreadPoolExecutor() as threads:
        meetings = list(threads.map(lambda rank: BetweenNodes(config, rank), range(2)))
        groups = list(threads.map(lambda meeting: meeting.join("tp", "tp0", range(2)), meetings))
        list(threads.map(lambda group: group.barrier(), groups))
    places = listening() - before
    assert len(places) == 3, "the store, and gloo of two ranks"
    assert {ip for ip, _ in places} == {host}
    for group in groups:
        group.close()


def test_a_store_that_went_silent_with_its_host_does_not_keep_a_rank_from_saying_what_failed(monkeypatch):
    monkeypatch.setattr(gloo, "NAMING_S", 0.1)
    store = HashStore()
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda rank: GlooCommunicator(rank, 2, store, "tp", timeout_s=0.5), range(2))
        first._store, answered = Mock(), Event()
        first._store.check.side_effect = lambda keys: answered.wait()
        with pytest.raises(CollectiveError, match=r"^barrier in group 'tp', rank 0: .*\(the limit is 0.5 s\)$"):
            first.barrier()
        answered.set()
    second.close()
