"""Sampling: what each parameter does, and that a request's tokens depend on nothing but itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nibble.kernels.torch.sampling import filter_logits, gumbel_argmax, uniform
from nibble.model_executor.logprobs import LogprobsWanted
from nibble.model_executor.sampler import Sampler, SamplingRow
from nibble.sampling_params import SamplingParams, validate_sampling_params
from nibble.utils.errors import RequestError

VOCAB = 50
EOS = 3


def row(seed=1, tokens=(5, 6), prompt_length=2, top_logprobs=None, **sampling) -> SamplingRow:
    logprobs = None if top_logprobs is None else LogprobsWanted(top_logprobs)
    return SamplingRow(SamplingParams(**sampling), seed, list(tokens), prompt_length, logprobs)


def sample(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int | None]:
    return [token.token_id for token in Sampler([EOS]).sample(logits, rows)]


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 2


def frequencies(logits: torch.Tensor, draws: int = 4000, **sampling) -> torch.Tensor:
    rows = [row(seed=seed, **sampling) for seed in range(draws)]
    tokens = sample(logits.expand(draws, -1), rows)
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB) / draws


def test_temperature_zero_takes_the_likeliest_token(logits):
    assert sample(logits, [row(temperature=0)]) == [int(logits.argmax())]
    assert sample(logits, [row(temperature=1e-30)]) == [int(logits.argmax())]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_with_the_probabilities_of_the_model(logits, temperature):
    expected = (logits[0] / temperature).softmax(-1)
    found = frequencies(logits, temperature=temperature)
    assert (found - expected).abs().sum() / 2 < 0.06  # total variation; about 0.03 is chance at 4000 draws


def test_top_k_top_p_and_min_p_keep_exactly_the_likeliest_tokens(logits):
    probabilities, order = logits[0].softmax(-1).sort(descending=True)
    cumulative = probabilities.cumsum(0)
    kept = {
        "top_k": (dict(top_k=5), 5),
        "top_p": (dict(top_p=0.6), int((cumulative < 0.6).sum()) + 1),
        "min_p": (dict(min_p=0.2), int((probabilities >= 0.2 * probabilities[0]).sum())),
        "all": (dict(top_k=7, top_p=0.9, min_p=0.05), None),
    }
    for name, (sampling, count) in kept.items():
        support = frequencies(logits, **sampling).nonzero().flatten().tolist()
        if count is None:
            count = len(support)
        assert set(support) <= set(order[:count].tolist()), name
    tensors = [torch.tensor([value]) for value in (VOCAB, 0.6, 0.0)]
    assert int(filter_logits(logits, *tensors).isfinite().sum()) == kept["top_p"][1]


def test_the_likeliest_token_survives_every_filter():
    flat = torch.zeros(1, VOCAB)
    assert 0 <= sample(flat, [row(top_k=1, top_p=1e-9, min_p=1.0)])[0] < VOCAB


def test_a_seeded_request_draws_the_same_whatever_else_is_in_the_batch():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, VOCAB, generator=generator)
    mine = row(seed=77, tokens=(1, 2, 3, 4), top_p=0.9, frequency_penalty=0.5)
    others = [row(seed=i, temperature=i / 4, top_k=i + 1, logit_bias={i: 9.0}) for i in range(7)]
    alone = sample(logits[:1], [mine])[0]
    for place in range(8):
        rows = [*others[:place], mine, *others[place:]]
        batch = torch.cat([logits[1 : 1 + place], logits[:1], logits[1 + place :]])
        assert sample(batch, rows)[place] == alone


def test_a_seed_gives_new_numbers_at_every_position_and_other_seeds_others():
    numbers = uniform(torch.tensor([1, 1, 2, -5]), torch.tensor([0, 1, 0, 0]), 1000)
    assert len(numbers.unique()) == numbers.numel()
    assert bool((numbers > 0).all()) and bool((numbers < 1).all())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_random_numbers_are_uniform_for_any_seed(seed):
    numbers = uniform(torch.tensor([seed]), torch.tensor([0]), 20000)[0].sort().values
    distance = (numbers - torch.arange(1, 20001) / 20000).abs().max()  # Kolmogorov-Smirnov
    assert distance < 0.018  # exceeded by chance once in 200,000 draws


def test_gumbel_argmax_never_draws_what_is_impossible():
    logits = torch.full((200, 10), float("-inf"))
    logits[:, 4] = -50.0
    assert gumbel_argmax(logits, torch.arange(200), torch.zeros(200, dtype=torch.int64)).unique().tolist() == [4]


def test_penalties_follow_their_formulas():
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.5]])
    history = [0, 1, 2, 2]  # prompt 0, 1; answer 2, 2
    token = lambda **p: sample(logits, [row(tokens=history, temperature=0, **p)])[0]  # noqa: E731
    assert token() == 2
    assert token(frequency_penalty=0.4) == 2  # 3 - 2 * 0.4 = 2.2 > 2
    assert token(frequency_penalty=0.6) == 0  # 3 - 2 * 0.6 = 1.8 < 2: the prompt is not penalized
    assert token(presence_penalty=0.9) == 2 and token(presence_penalty=1.1) == 0
    # Repetition divides what was seen anywhere, prompt included: 2 / 2 = 1, 3 / 2 = 1.5.
    assert token(repetition_penalty=2.0) == 2
    assert token(repetition_penalty=2.0, presence_penalty=1.1) == 0


def test_repetition_penalty_makes_negative_logits_more_negative():
    logits = torch.tensor([[-1.0, -1.5]])
    assert sample(logits, [row(tokens=[0], prompt_length=1, temperature=0, repetition_penalty=2.0)]) == [1]


def test_logit_bias_moves_the_choice(logits):
    assert sample(logits, [row(temperature=0, logit_bias={17: 100.0})]) == [17]
    best = int(logits.argmax())
    assert sample(logits, [row(temperature=0, logit_bias={best: -100.0})]) != [best]


def test_neither_end_nor_stop_tokens_come_before_min_new_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 9], logits[0, 8] = 9.0, 8.0, 7.0
    early = row(temperature=0, min_new_tokens=2, stop_token_ids=(9,), tokens=(5, 6, 7), prompt_length=2)
    late = row(temperature=0, min_new_tokens=2, stop_token_ids=(9,), tokens=(5, 6, 7, 7), prompt_length=2)
    assert sample(logits.expand(2, -1), [early, late]) == [8, EOS]


def test_a_row_that_is_not_finite_fails_alone(logits):
    batch = logits.repeat(3, 1)
    batch[1, 4] = float("nan")
    best = int(logits.argmax())
    rows = [row(temperature=0, top_logprobs=2), row(temperature=1), row(temperature=0)]
    result = Sampler([EOS]).sample(batch, rows)
    assert [token.token_id for token in result] == [best, None, best]


def test_a_row_that_is_not_finite_may_want_log_probabilities(logits):
    """They were looked up under token -1, which ended the rank."""
    logits = torch.cat([logits, torch.full((1, VOCAB), float("nan"))])
    rows = [row(temperature=temperature, top_logprobs=2) for temperature in (0, 0)]
    for kind in (rows, [row(temperature=1, top_logprobs=2, logit_bias={4: 1.0}) for _ in range(2)]):
        whole, failed = Sampler([EOS]).sample(logits, kind)
        assert failed == (None, None)
        assert whole.token_id is not None and whole.logprob.token_id == whole.token_id


def test_tokens_that_a_graph_has_chosen_are_taken_as_they_are_and_others_do_not_overwrite_them(logits):
    """The next step reads them where the graph has left them."""
    logits = logits.repeat(3, 1)
    greedy = torch.tensor([7, 8, -1])
    sampler = Sampler([EOS])
    assert sampler.launch(logits, [row(temperature=0)] * 3, greedy).token_ids is greedy
    rows = [row(temperature=0), row(temperature=0, logit_bias={11: 100.0}), row(temperature=1)]
    assert sampler.launch(logits, rows, greedy).token_ids.tolist() == [int(logits[0].argmax()), 11, -1]
    rows = [row(temperature=0), row(temperature=1, top_k=1), row(temperature=1)]
    assert sampler.launch(logits, rows, greedy).token_ids.tolist() == [7, int(logits[1].argmax()), -1]
    assert greedy.tolist() == [7, 8, -1]


def test_log_probabilities_are_the_models_own(logits):
    expected = logits[0].log_softmax(-1)
    (token,) = Sampler([EOS]).sample(logits, [row(temperature=2.0, logit_bias={7: 50.0}, top_logprobs=3)])
    assert token.token_id == 7
    assert token.logprob.logprob == pytest.approx(float(expected[7]), abs=1e-5)
    assert [t for _, t in token.logprob.top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_p", 0.0),
        ("top_p", 1.1), ("top_k", 0), ("top_k", -2), ("min_p", 1.5), ("max_new_tokens", -1), ("n", 0),
        ("frequency_penalty", 2.5), ("presence_penalty", -2.5), ("repetition_penalty", 0.0), ("n", 1000),
        ("min_new_tokens", 999), ("logit_bias", {VOCAB: 1.0}), ("logit_bias", {1: 101.0}),
        ("stop_token_ids", (-1,)), ("stop", ("",)), ("stop", ("x",) * 65), ("sampling_seed", 2**63),
    ],
)  # fmt: skip
def test_a_parameter_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError) as error:
        validate_sampling_params(SamplingParams(**{field: value}), VOCAB)
    assert error.value.field == field
    assert field in str(error.value)
