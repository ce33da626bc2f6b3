"""The demo model through the server: the FP4 gather changes nothing, nor does the number of ranks, but for near ties.

200 held-out questions are asked greedily of servers with 1 to 4 ranks, and of some that gather unquantized rows, or
whose experts' results travel in FP8.
"""

import sys
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from server_process import DEMO_MODEL, launch, parallel_flags

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.demo_model.data import heldout

COUNT = 200
FP8_RESULTS = ("--moe-combine-dtype", "fp8")
NEAR_TIE = 0.5
"""Natural-log probability between the two likeliest tokens; FP4 rounds values by up to a few percent."""


@cache
def questions() -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    return [
        tokenizer.apply_chat_template(conversation.prompt, add_generation_prompt=True, tokenize=False)
        for conversation in heldout(COUNT)
    ]


class Answers:
    """The tokens of every answer, and the two likeliest tokens at each of their positions."""

    def __init__(self, outputs: list[dict]) -> None:
        self.tokens = [output["output_ids"] for output in outputs]
        self.top2 = [output["meta_info"]["output_top_logprobs"] for output in outputs]
        self.ranks = {output["meta_info"]["dp_rank"] for output in outputs}


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Asks all questions of a server with these flags, once per set of flags."""

    @cache
    def run(ranks: int, *flags: str, pinned_rank: int | None = None) -> Answers:
        log = tmp_path_factory.mktemp("server") / "log"
        with launch(log, *parallel_flags(ranks), *flags) as server:
            outputs = server.generate(
                text=questions(),
                sampling_params={"temperature": 0, "max_new_tokens": 64},
                return_logprob=True,
                top_logprobs_num=2,
                data_parallel_rank=pinned_rank,
            )
        unquantized = flags and flags != FP8_RESULTS
        assert f"FP4 all-gather is {'off' if unquantized else 'on'}" in log.read_text()
        return Answers(outputs)

    return run


def test_fp4_gather_on_and_off_give_identical_text(ask):
    on = ask(2)
    off = ask(2, "--disable-flashinfer-cutlass-moe-fp4-allgather")
    assert len(on.tokens) == COUNT
    assert on.tokens == off.tokens


def test_results_that_travel_in_fp8_give_the_same_text_but_for_near_ties(ask):
    assert_same_but_for_near_ties(ask(2), ask(2, *FP8_RESULTS))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_gives_the_text_of_one_but_for_near_ties(ask, ranks):
    one, many = ask(1), ask(ranks)
    assert many.ranks == set(range(ranks)), "every rank served requests"
    assert_same_but_for_near_ties(one, many)


@pytest.mark.parametrize(("ranks", "flags"), [(2, ("--dp", "1", "--ep", "1")), (4, ("--dp", "2", "--ep", "2"))])
def test_layers_split_over_ranks_give_the_text_of_one_but_for_near_ties(ask, ranks, flags):
    assert_same_but_for_near_ties(ask(1), ask(ranks, *flags))


def test_a_burst_pinned_to_one_rank_is_served_while_the_other_has_no_request_at_all(ask):
    pinned = ask(2, pinned_rank=1)
    assert pinned.ranks == {1}
    assert_same_but_for_near_ties(ask(2), pinned)


def assert_same_but_for_near_ties(expected: Answers, found: Answers) -> None:
    different = [i for i, (a, b) in enumerate(zip(expected.tokens, found.tokens, strict=True)) if a != b]
    assert len(different) <= 0.01 * COUNT, [questions()[index] for index in different]
    for index in different:
        a, b = expected.tokens[index], found.tokens[index]
        position = next(i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
        (first, _, _), (second, runner_up, _) = expected.top2[index][position]
        assert b[position] == runner_up, questions()[index]
        assert first - second < NEAR_TIE, questions()[index]
