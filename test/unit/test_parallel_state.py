"""Which ranks form which group, and which experts a rank holds."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from checkpoints import COMMON
from nibble.controller.async_engine import AsyncEngine
from nibble.distributed import parallel_state, peer_memory, pynccl
from nibble.distributed.communicator import CPU, Communicator, SingleRankCommunicator
from nibble.distributed.parallel_state import ParallelState, initialize_parallel
from nibble.ipc.messages import RankReady
from nibble.utils.errors import ConfigError
from runners import engine_config

SPLITS = [(tp, dp, ep) for tp in (1, 2, 4, 8) for dp in (1, 2, 4, 8) for ep in (1, 2, 4, 8) if max(dp, ep) <= tp]
DEMO_MODEL = Path(__file__).parents[2] / "assets" / "nibble-demo-6m-nvfp4"
MOE = {"num_experts": 24, "num_experts_per_tok": 4, "moe_intermediate_size": 64}


class Joined(SingleRankCommunicator):
    """A group that was never met, and the ranks that it was to join."""

    def __init__(self, name: str, members: tuple[int, ...], rank: int, device: torch.device) -> None:
        super().__init__(name, device)
        self.members, self.rank, self.world_size = members, members.index(rank), len(members)
        self.companions: list[Communicator] = []

    def take_along(self, other: Communicator) -> None:
        self.companions.append(other)


def join_on_cpu(meeting: parallel_state._Meeting, name: str, members: range) -> Joined:
    return Joined(name, tuple(members), meeting.rank, torch.device("cpu"))


def join_on_gpu(bootstrap: Joined, name: str, timeout_s: float, device: torch.device) -> Joined:
    """As `PyNcclCommunicator`, which has rank and size of the group that brings NCCL's id to its ranks."""
    return Joined(name, bootstrap.members, bootstrap.members[bootstrap.rank], device)


@pytest.fixture
def states(tmp_path):
    """The states of all ranks under a split."""

    def initialize(
        tp: int,
        dp: int,
        ep: int,
        model: dict | None = None,
        device: str = "cpu",
        peer_memory: bool = False,
        **args: object,
    ):
        name = "Qwen3ForCausalLM" if model == {} else "Qwen3MoeForCausalLM"
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
        content = {**COMMON, **heads, **(MOE if model is None else model), "architectures": [name]}
        (tmp_path / "config.json").write_text(json.dumps({**content, "rms_norm_eps": 1e-6}))
        sizes = {"tp_size": tp, "dp_size": dp, "ep_size": ep, "enable_dp_attention": True}
        config = replace(engine_config(tmp_path, **{**sizes, **args}), device=device, num_gpus=2)
        config = replace(config, moe_comm_backend="peer" if peer_memory else None)
        with (
            mock.patch.object(parallel_state._Meeting, "_join_on_cpu", join_on_cpu),
            mock.patch.object(pynccl, "PyNcclCommunicator", join_on_gpu),
            mock.patch.object(parallel_state._Meeting, "between_nodes"),
            mock.patch.object(torch.cuda, "set_device"),
        ):
            return [initialize_parallel(config, rank, tmp_path) for rank in range(tp)]

    return initialize


def members(group: Communicator, rank: int) -> tuple[int, ...]:
    return group.members if isinstance(group, Joined) else (rank,)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("tp", "dp", "ep"), SPLITS)
def test_groups_are_of_neighbours_and_cross_each_other(states, tp, dp, ep, device):
    attn_tp = tp // dp
    for rank, state in enumerate(states(tp, dp, ep, device=device)):
        first = rank // attn_tp * attn_tp
        assert members(state.tp_group, rank) == tuple(range(tp))
        assert members(state.attn_tp_group, rank) == tuple(range(first, first + attn_tp))
        assert members(state.dp_group, rank) == tuple(range(rank % attn_tp, tp, attn_tp))
        assert state.dp_group.rank == rank // attn_tp
        assert state.device.type == device and state.cpu_group.device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_groups_of_the_same_ranks_are_one(states, device):
    """Each takes memory, and on a GPU channels that its neighbours need."""
    for state in states(4, 4, 4, device=device):
        assert state.tp_group is state.dp_group and state.attn_tp_group is state.dense_tp_group
    for state in states(4, 1, 4, device=device):
        assert state.tp_group is state.attn_tp_group is state.dense_tp_group


@pytest.mark.parametrize(("tp", "dp", "ep"), SPLITS)
def test_every_part_of_every_expert_is_on_one_rank(states, tp, dp, ep):
    held: Counter[tuple[int, int]] = Counter()
    for state in states(tp, dp, ep):
        assert state.moe_tp_size == tp // ep
        held.update((expert, state.moe_tp_rank) for expert in state.local_experts(24))
    assert held == Counter((expert, part) for expert in range(24) for part in range(tp // ep))


def test_attention_groups_of_a_dense_model_never_meet(states):
    dense: list[ParallelState] = states(4, 2, 1, model={})
    for rank, state in enumerate(dense):
        assert state.tp_group is state.attn_tp_group and state.dp_group.world_size == 1
        assert members(state.cpu_group, rank) == members(state.attn_tp_group, rank)


def test_dense_layers_are_split_inside_the_attention_group_or_not_at_all(states):
    for state in states(4, 2, 2):
        assert state.dense_tp_group is state.attn_tp_group
    for state in states(4, 2, 2, moe_dense_tp_size=1):
        assert state.dense_tp_group.world_size == 1 and state.attn_tp_group.world_size == 2


def open_peer_memory(
    tmp_path: Path, asked: str, opened: mock.Mock, combine: str = "bf16", **args: object
) -> tuple[object, mock.Mock]:
    """What rank 0 of two gets where `opened` stands for the memory's own function, and its group on the GPU."""
    content = {**COMMON, **MOE, "architectures": ["Qwen3MoeForCausalLM"], "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(content))
    sizes = {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}
    sizes |= {"chunked_prefill_size": 96, "max_running_requests": 10, "dist_timeout": 50.0, **args}
    config = engine_config(tmp_path, **sizes)
    asking = replace(config.args, moe_comm_backend=asked, moe_combine_dtype=combine)
    meeting = parallel_state._Meeting(replace(config, args=asking), 0, tmp_path)
    group = mock.Mock()
    function = "open_peer_memory" if config.parallel.nnodes == 1 else "open_peer_memory_of_hosts"
    with (
        mock.patch.object(meeting, "join", return_value=group),
        mock.patch.object(meeting, "join_on_cpu", lambda name, members: tuple(members)),
        mock.patch.object(peer_memory, function, opened),
    ):
        return meeting.open_peer_memory("tp", range(config.parallel.world_size)), group


def test_peer_memory_holds_a_chunk_beside_all_requests_of_every_rank_and_its_group_watches_it(tmp_path):
    opened = mock.Mock()
    memory, group = open_peer_memory(tmp_path, "auto", opened)
    assert memory is opened.return_value
    _, device, layout, patience_s = opened.call_args.args
    assert device is group.device and layout.max_rows == 2 * (96 + 10)
    assert patience_s == 40, "shorter than the group's 50 s"
    group.watch.assert_called_once_with(opened.return_value.raise_failure)


ON_HOSTS = {"tp_size": 6, "dp_size": 6, "ep_size": 6, "nnodes": 3, "dist_init_addr": "node0:5000"}


def test_on_several_hosts_peer_memory_is_of_a_hosts_ranks_and_holds_the_rows_of_all(tmp_path):
    opened = mock.Mock()
    memory, group = open_peer_memory(tmp_path, "auto", opened, **ON_HOSTS)
    assert memory is opened.return_value
    host, all_hosts, device, layout, patience_s = opened.call_args.args
    assert (host, all_hosts) == ((0, 1), tuple(range(6)))
    assert device is group.device and layout.max_rows == 6 * (96 + 10) and patience_s == 40
    group.watch.assert_called_once_with(opened.return_value.raise_failure)


@pytest.mark.parametrize("reached", [True, False])
def test_rails_are_of_the_same_place_on_each_host_and_only_beside_peer_memory(states, monkeypatch, reached):
    memory = mock.Mock() if reached else None
    monkeypatch.setattr(parallel_state._Meeting, "open_peer_memory", lambda *_: memory)
    for rank, state in enumerate(states(6, 6, 6, device="cuda", peer_memory=True, **ON_HOSTS)):
        assert state.peer_memory is memory
        assert state.tp_group.companions == ([state.rail_group] if reached else [])
        assert (members(state.rail_group, rank) if state.rail_group else None) == (
            tuple(range(rank % 2, 6, 2)) if reached else None
        )
    assert [state.rail_group for state in states(4, 4, 4, device="cuda", peer_memory=True)] == [None] * 4


class Host(SingleRankCommunicator):
    """One rank of the group of all hosts; the others' reasons are known."""

    def __init__(self, rank: int, reasons: list[str]) -> None:
        super().__init__("all hosts")
        self.rank, self.world_size, self.reasons = rank, len(reasons), reasons

    def _all_gatherv(self, tensors: tuple[torch.Tensor, ...], sizes: tuple[int, ...]) -> list[torch.Tensor]:
        (own,) = tensors
        rows = own.new_zeros(self.world_size, own.shape[1])
        for row, reason in zip(rows, self.reasons, strict=True):
            row[: len(reason)] = torch.tensor(list(reason.encode()), dtype=torch.uint8)
        rows[self.rank] = own[0]
        return [rows]


def open_of_hosts(opened: mock.Mock, here: str = "", elsewhere: str = "") -> object:
    """What the second rank of the second of three hosts gets, where ranks of this or the third one have a reason."""
    all_hosts = Host(3, ["", "", here, here, elsewhere, elsewhere])
    with mock.patch.object(peer_memory, "_open", opened):
        return peer_memory.open_peer_memory_of_hosts(Host(1, [""] * 2), all_hosts, CPU, mock.Mock(), 1.0)


def test_every_host_opens_its_own_peer_memory():
    opened = mock.Mock()
    assert open_of_hosts(opened) is opened.return_value and not opened.return_value.close.called
    assert opened.call_args.args[-1] == 2, "the number of the host's first rank"


def test_a_host_that_cannot_open_peer_memory_has_all_hosts_do_without():
    reason, opened = "rank 5: no peer access", mock.Mock()
    with pytest.raises(peer_memory.PeerMemoryUnavailable, match=f"^{reason}$"):
        open_of_hosts(opened, elsewhere=reason)
    assert opened.return_value.close.called, "what this host has opened is given back"
    reason = "rank 2: no peer access"
    with pytest.raises(peer_memory.PeerMemoryUnavailable, match=f"^{reason}$"):
        open_of_hosts(mock.Mock(side_effect=peer_memory.PeerMemoryUnavailable(reason)), here=reason)


@pytest.mark.parametrize("combine", ["bf16", "fp8"])
def test_peer_memory_holds_results_in_the_type_that_was_asked_for(tmp_path, combine):
    opened = mock.Mock()
    open_peer_memory(tmp_path, "auto", opened, combine)
    assert opened.call_args.args[2].fp8_partial == (combine == "fp8")


def test_where_memory_cannot_be_reached_auto_does_without_and_rank_0_says_why(tmp_path, caplog):
    opened = mock.Mock(side_effect=peer_memory.PeerMemoryUnavailable("rank 1: no peer access"))
    memory, group = open_peer_memory(tmp_path, "auto", opened)
    assert memory is None and not group.watch.called
    assert "through NCCL; no peer memory: rank 1: no peer access" in caplog.text


@pytest.mark.parametrize(("reached", "used"), [(True, "peer"), (False, "nccl")])
def test_server_info_tells_the_backend_that_is_used_and_not_the_one_that_was_hoped_for(tmp_path, reached, used):
    opened = mock.Mock(side_effect=None if reached else peer_memory.PeerMemoryUnavailable("no peer access"))
    memory, group = open_peer_memory(tmp_path, "auto", opened)
    state = ParallelState(0, *[group] * 5, ep_size=2, peer_memory=memory)
    config = replace(engine_config(DEMO_MODEL), moe_comm_backend="peer")
    engine = AsyncEngine(config)
    engine._handle(RankReady(0, parallel_state.moe_comm_backend(config, state)))
    assert engine.server_info()["resolved"]["moe_comm_backend"] == used


def test_where_memory_cannot_be_reached_asking_for_it_is_an_error(tmp_path):
    opened = mock.Mock(side_effect=peer_memory.PeerMemoryUnavailable("rank 1: no peer access"))
    with pytest.raises(ConfigError, match=r"^--moe-comm-backend peer: rank 1: no peer access; use nccl or auto$"):
        open_peer_memory(tmp_path, "peer", opened)
