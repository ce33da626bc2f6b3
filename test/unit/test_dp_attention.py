"""The row counts of a step: installed once, never nested, always cleared, never those of another group."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nibble.distributed.communicator import Communicator, SingleRankCommunicator
from nibble.distributed.parallel_state import ParallelState
from nibble.layers.dp_attention import (
    DpPaddingMode,
    DpStep,
    cheapest_padding_mode,
    dp_gather,
    dp_pad,
    dp_reduce_scatter,
    dp_step,
    get_dp_global_num_tokens,
    get_dp_local_num_tokens,
    get_dp_padding_mode,
    get_dp_rank,
    get_dp_size,
    mask_padding,
)
from nibble.layers.moe.combiner import ReduceScatterCombiner
from nibble.layers.moe.token_dispatcher import AllGatherDispatcher
from runners import data_parallel_state


class ThirdOfThree(SingleRankCommunicator):
    """Rank 2 of a group of three, in which nothing travels."""

    def __init__(self) -> None:
        Communicator.__init__(self, rank=2, world_size=3, name="dp")


def step_of(group: Communicator, *sizes: int, is_padding: torch.Tensor | None = None) -> DpStep:
    return DpStep(data_parallel_state(group), sizes, sizes, is_padding)


def test_layers_ask_for_the_rows_of_the_step_that_runs():
    with dp_step(step_of(ThirdOfThree(), 4, 0, 7)):
        assert get_dp_global_num_tokens() == (4, 0, 7)
        assert get_dp_local_num_tokens() == 7
        assert (get_dp_rank(), get_dp_size()) == (2, 3)


@pytest.mark.parametrize("ask", [get_dp_global_num_tokens, get_dp_local_num_tokens, get_dp_rank, get_dp_size])
def test_outside_a_step_there_is_no_answer(ask):
    with pytest.raises(RuntimeError, match="no forward pass is running"):
        ask()


def test_steps_do_not_nest():
    step = step_of(SingleRankCommunicator("dp"), 1)
    with dp_step(step), pytest.raises(RuntimeError, match="already running"), dp_step(step):
        pass


def test_a_step_that_fails_is_cleared_all_the_same():
    step = step_of(SingleRankCommunicator("dp"), 1)
    with pytest.raises(KeyError), dp_step(step):
        raise KeyError
    with dp_step(step):
        pass


def test_gather_sizes_of_another_group_are_refused():
    with pytest.raises(ValueError, match="2 sizes for the 3 ranks of group 'dp'"):
        step_of(ThirdOfThree(), 1, 1)


def test_rows_that_are_not_the_steps_are_refused_before_anything_is_sent():
    with dp_step(step_of(ThirdOfThree(), 4, 0, 7)):
        with pytest.raises(ValueError, match="6 rows"):
            dp_gather([torch.zeros(6, 8)])
        with pytest.raises(ValueError, match="7 rows"):
            dp_reduce_scatter(torch.zeros(7, 8))


def test_rows_that_only_fill_up_a_graph_are_routed_to_no_expert():
    """They would skew the experts' counts, and a NaN in one would reach the sums of others."""
    topk_ids = torch.tensor([[3, 1], [0, 2], [7, 7]], dtype=torch.int32)
    is_padding = torch.tensor([[False], [True], [True]])
    with dp_step(step_of(SingleRankCommunicator("dp"), 3, is_padding=is_padding)):
        assert mask_padding(topk_ids).tolist() == [[3, 1], [-1, -1], [-1, -1]]
    assert topk_ids.tolist() == [[3, 1], [0, 2], [7, 7]]
    with dp_step(step_of(SingleRankCommunicator("dp"), 3)):
        assert mask_padding(topk_ids) is topk_ids


# Attention groups of several ranks


def first_of_two_pairs(*sizes: int) -> DpStep:
    """Rank 0 of two attention groups of two ranks."""
    tp, attn_tp, dp = (SingleRankCommunicator(name) for name in ("tp", "attn_tp", "dp"))
    tp.world_size, attn_tp.world_size, dp.world_size = 4, 2, 2
    return DpStep(ParallelState(0, tp, attn_tp, attn_tp, dp, tp), sizes, sizes)


def test_sizes_of_all_ranks_never_meet_a_collective_of_one_rank_from_each_group():
    """Gather sizes were taken from one group and the collective run on another: wrong rows, or a hang."""
    with pytest.raises(ValueError, match="4 sizes for the 2 ranks of group 'dp'"):
        first_of_two_pairs(3, 3, 2, 2)
    with dp_step(first_of_two_pairs(3, 2)):
        assert (get_dp_global_num_tokens(), get_dp_size(), get_dp_rank()) == ((3, 2), 2, 0)
        assert get_dp_local_num_tokens() == 3


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8).filter(any), st.integers(1, 8))
def test_the_padding_mode_is_the_one_in_which_fewer_rows_travel(sizes, attn_tp):
    groups, total = len(sizes), sum(sizes)
    longest = max(sizes) + -max(sizes) % attn_tp
    in_group = longest if attn_tp > 1 else 0
    rows = {
        DpPaddingMode.SUM_LEN: total + total * (2 if attn_tp > 1 else 1),  # gather; all-reduce or reduce-scatter
        DpPaddingMode.MAX_LEN: groups * longest + groups * longest + in_group,  # gather; reduce-scatter; gather
    }
    assert rows[cheapest_padding_mode(sizes, attn_tp)] == min(rows.values())


def test_ranks_that_are_a_group_each_never_pad():
    assert cheapest_padding_mode((5, 5), attn_tp_size=1) is DpPaddingMode.SUM_LEN


def test_even_groups_are_padded_until_every_rank_can_own_equally_many_rows_and_padding_is_routed_to_no_expert():
    x, topk_ids, topk_weights = torch.ones(7, 4), torch.ones(7, 2, dtype=torch.int32), torch.ones(7, 2)
    step = first_of_two_pairs(7, 8)
    with dp_step(step), mock.patch.object(SingleRankCommunicator, "_all_gatherv", lambda _, tensors, sizes: [*tensors]):
        assert get_dp_padding_mode() is DpPaddingMode.MAX_LEN and step.gathered_sizes == (8, 8)
        rows = AllGatherDispatcher(ReduceScatterCombiner()).dispatch(x, topk_ids, topk_weights)
    assert rows.x.shape == (8, 4) and rows.topk_ids[-1].tolist() == [-1, -1] and not rows.topk_weights[-1].any()
    assert torch.equal(rows.topk_ids[:7], topk_ids)


def test_very_uneven_groups_are_not_padded():
    x = torch.ones(40, 4)
    with dp_step(first_of_two_pairs(40, 1)):
        assert get_dp_padding_mode() is DpPaddingMode.SUM_LEN
        assert dp_pad(x) is x
