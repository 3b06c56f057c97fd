"""Choices from logits whose right answer is known by hand or by a count."""

import math
from typing import Any

import pytest
import torch

from luthier.core.errors import SelfCheckError
from luthier.inference.sampler import MIN_LOGPROB, choose
from luthier.inference.sequence import SamplingOptions, Sequence


class _NoText:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(**options: Any) -> Sequence:
    return Sequence(
        key=("base", None),
        served=None,
        prompt_ids=[1],
        options=SamplingOptions(max_tokens=10, **options),
        decoder=_NoText(),
        stop_token_ids=frozenset(),
        emit=lambda event: None,
    )


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def test_temperature_zero_takes_the_likeliest() -> None:
    choices = choose(logits([0.0, 3.0, 1.0], [5.0, 3.0, 1.0]), [sequence(temperature=0.0) for _ in range(2)])
    assert [choice.token_id for choice in choices] == [1, 0]


def test_a_tiny_temperature_takes_the_likeliest_and_never_overflows() -> None:
    assert choose(logits([0.0, 300.0, 299.0]), [sequence(temperature=1e-300, seed=1)])[0].token_id == 1


def test_draws_follow_the_distribution() -> None:
    row = sequence(temperature=1.0, seed=7)
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[choose(probabilities.log().unsqueeze(0), [row])[0].token_id] += 1
    # Four standard deviations of a share of 4000 draws are at most 0.032.
    assert torch.allclose(counts / 4000, probabilities, atol=0.032)


@pytest.mark.parametrize(
    ("top_p", "possible"), [(0.0, {0}), (0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1}), (1.0, {0, 1, 2})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_its_mass(top_p: float, possible: set[int]) -> None:
    row = sequence(temperature=1.0, top_p=top_p, seed=3)
    logits_BV = torch.tensor([[0.5, 0.375, 0.125]]).log()
    drawn = {choose(logits_BV, [row])[0].token_id for _ in range(300)}
    assert drawn == possible


def test_a_seed_gives_the_same_draws_in_any_batch() -> None:
    torch.manual_seed(0)
    steps = torch.randn(20, 50)
    alone = sequence(temperature=1.3, top_p=0.9, seed=-5)
    expected = [choose(step.unsqueeze(0), [alone])[0].token_id for step in steps]
    again, other = sequence(temperature=1.3, top_p=0.9, seed=-5), sequence(temperature=1.0, seed=9)
    mixed = [choose(torch.stack([step.flip(0), step]), [other, again])[1].token_id for step in steps]
    assert mixed == expected
    assert len(set(expected)) > 5


def test_logprobs_are_those_of_the_model_before_temperature() -> None:
    row = sequence(temperature=2.0, seed=1, num_logprobs=2)
    choice = choose(logits([1.0, 2.0, 4.0]), [row])[0]
    total = math.log(sum(math.exp(value) for value in (1.0, 2.0, 4.0)))
    assert choice.top[0] == (2, pytest.approx(4.0 - total, abs=1e-6))
    assert choice.top[1] == (1, pytest.approx(2.0 - total, abs=1e-6))
    assert choice.logprob == pytest.approx([1.0, 2.0, 4.0][choice.token_id] - total, abs=1e-6)


def test_a_token_that_cannot_come_has_a_finite_logprob() -> None:
    choice = choose(logits([0.0, -math.inf]), [sequence(temperature=0.0, num_logprobs=2)])[0]
    assert choice.top == ((0, 0.0), (1, MIN_LOGPROB))


def test_more_alternatives_than_the_vocabulary_are_all_of_it() -> None:
    assert len(choose(logits([0.0, 1.0]), [sequence(temperature=0.0, num_logprobs=20)])[0].top) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_never_answered(temperature: float) -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(SelfCheckError):
            choose(logits([0.0, bad, 1.0]), [sequence(temperature=temperature)])


def test_logprobs_are_absent_unless_asked_for() -> None:
    assert choose(logits([0.0, 1.0]), [sequence(temperature=0.0)])[0].logprob is None
