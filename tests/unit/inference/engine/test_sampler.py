"""Choices from logits whose right answer is known by hand or by a count."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import SelfCheckError
from luthier.inference.engine import sampler
from luthier.inference.engine.sampler import MIN_LOGPROB
from luthier.inference.engine.sequence import Choice
from luthier_cpu.decode import sampling as logits_module
from luthier_cpu.decode.sampling import Logits
from tests.unit.inference.sequences import Asked, ask


def request(temperature: float = 0.0, **options: Any) -> Asked:
    return ask([1], 10, temperature=temperature, **options)


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


def choose(logits_BV: torch.Tensor, requests: list[Asked]) -> list[Choice]:
    return sampler.choose(Logits.of(logits_BV), [one.sequence for one in requests])


def test_a_temperature_of_zero_takes_the_likeliest_and_a_tiny_one_never_overflows():
    logits_BV = logits([0.0, 3.0, 1.0], [5.0, 3.0, 1.0], [0.0, 300.0, 299.0])
    choices = choose(logits_BV, [request(), request(), request(temperature=1e-300, seed=1)])
    assert [choice.token_id for choice in choices] == [1, 0, 1]


def test_draws_follow_the_distribution():
    one = request(temperature=1.0, seed=7)
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    counts = torch.zeros(3)
    for _ in range(4000):
        counts[choose(probabilities.log().unsqueeze(0), [one])[0].token_id] += 1
    # Four standard deviations of a share of 4000 draws are at most 0.032.
    assert torch.allclose(counts / 4000, probabilities, atol=0.032)


@pytest.mark.parametrize(
    ("top_p", "possible"), [(0.0, {0}), (0.4, {0}), (0.6, {0, 1}), (0.8, {0, 1}), (1.0, {0, 1, 2})]
)
def test_top_p_keeps_the_fewest_tokens_that_reach_its_mass(top_p, possible):
    one = request(temperature=1.0, top_p=top_p, seed=3)
    logits_BV = torch.tensor([[0.5, 0.375, 0.125]]).log()
    drawn = {choose(logits_BV, [one])[0].token_id for _ in range(300)}
    assert drawn == possible


def test_a_seed_gives_the_same_draws_in_any_batch():
    torch.manual_seed(0)
    steps = torch.randn(20, 50)
    alone = request(temperature=1.3, top_p=0.9, seed=-5)
    expected = [choose(step.unsqueeze(0), [alone])[0].token_id for step in steps]
    again, other = request(temperature=1.3, top_p=0.9, seed=-5), request(temperature=1.0, seed=9)
    mixed = [choose(torch.stack([step.flip(0), step]), [other, again])[1].token_id for step in steps]
    assert mixed == expected
    assert len(set(expected)) > 5


def test_logprobs_are_those_of_the_model_before_temperature():
    one = request(temperature=2.0, seed=1, num_logprobs=2)
    choice = choose(logits([1.0, 2.0, 4.0]), [one])[0]
    total = math.log(sum(math.exp(value) for value in (1.0, 2.0, 4.0)))
    assert choice.top[0] == (2, pytest.approx(4.0 - total, abs=1e-6))
    assert choice.top[1] == (1, pytest.approx(2.0 - total, abs=1e-6))
    assert choice.logprob == pytest.approx([1.0, 2.0, 4.0][choice.token_id] - total, abs=1e-6)


def test_logprobs_are_finite_those_of_the_vocabulary_at_most_and_absent_unless_asked_for():
    logits_BV = logits(*[[0.0, -math.inf]] * 3)
    two, many, none = choose(logits_BV, [request(num_logprobs=2), request(num_logprobs=20), request()])
    assert two.top == many.top == ((0, 0.0), (1, MIN_LOGPROB))
    assert none.logprob is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_end_their_own_answer_alone(temperature, bad):
    requests = [request(temperature=temperature), request(temperature=temperature)]
    choices = choose(logits([0.0, bad, 1.0], [0.0, 50.0, 1.0]), requests)
    [failure] = requests[0].events
    assert isinstance(failure.error, SelfCheckError) and requests[0].sequence.is_finished
    assert choices[1].token_id == 1 and not requests[1].sequence.is_finished
    for one, choice in zip(requests, choices, strict=True):
        one.sequence.accept(choice)
    assert requests[0].events == [failure] and requests[0].sequence.num_completion_tokens == 0


class _Fixed:
    """A grammar that allows a set of tokens, ever the same, or none but a fault."""

    is_finished = False

    def __init__(self, allowed: set[int], fault: Exception | None = None) -> None:
        self.allowed = allowed
        self._fault = fault

    def allows(self, token_id: int) -> bool:
        return token_id in self.allowed

    def mask(self) -> np.ndarray:
        if self._fault is not None:
            raise self._fault
        return np.array([token_id in self.allowed for token_id in range(3)])

    def push(self, token_id: int) -> None:
        assert token_id in self.allowed


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_the_grammar_allows_is_chosen_and_its_fault_ends_its_own_answer(temperature):
    requests = [
        request(temperature=temperature, seed=1, grammar=_Fixed({0, 2})),
        request(temperature=temperature, grammar=_Fixed(set(), RuntimeError("a secret"))),
        request(temperature=temperature, grammar=_Fixed(set())),
        request(),
    ]
    # A token of padding behind the vocabulary is the likeliest everywhere, and never comes.
    logits_BV = logits(*[[2.0, 90.0, 3.0, 99.0]] * 3, [0.0, 1.0, 0.0, 0.0])
    for _ in range(20):
        choices = choose(logits_BV, requests)
        assert choices[0].token_id in {0, 2} and choices[3].token_id == 1
    assert [len(one.events) for one in requests] == [0, 1, 1, 0]
    assert "secret" not in requests[1].events[0].error.message


def test_penalties_and_biases_move_the_choice_and_not_the_reported_logprobs():
    one = request(frequency_penalty=0.6, presence_penalty=0.5, num_logprobs=0)
    chosen = []
    for _ in range(5):
        [choice] = choose(logits([2.0, 1.0, -3.0]), [one])
        one.sequence.accept(choice)
        chosen.append(choice.token_id)
    # Of token 0: 2.0, then 2 - 0.5 - 0.6 = 0.9; of token 1: 1.0, then -0.1; then 0.3, -0.1; then -0.3, -0.1.
    assert chosen == [0, 1, 0, 0, 1]
    total = math.log(sum(math.exp(value) for value in (2.0, 1.0, -3.0)))
    assert choice.logprob == pytest.approx(1.0 - total, abs=1e-6)
    one = request(logit_bias=((2, 100.0), (0, -100.0)))
    assert choose(logits([9.0, 1.0, -80.0]), [one])[0].token_id == 2


def test_a_fault_in_drawing_ends_its_own_answer_alone(monkeypatch):
    requests = [request(temperature=1.0, seed=1), request(), request(temperature=1.0, seed=2)]
    logits_BV = logits(*[[1.0, 9.0, 2.0]] * 3)

    def broken(*_: Any, **__: Any) -> Any:
        raise MemoryError("a secret")

    monkeypatch.setattr(logits_module, "draw", broken)
    assert choose(logits_BV, requests)[1].token_id == 1
    assert [one.events for one in requests] == [[], [], []]
    invert = sampler._invert
    faulty = iter([True, False])
    monkeypatch.setattr(sampler, "_invert", lambda *given: broken() if next(faulty) else invert(*given))
    choose(logits_BV, requests)
    assert [len(one.events) for one in requests] == [1, 0, 0]
    assert "secret" not in requests[0].events[0].error.message


def test_sequences_drawn_at_once_are_drawn_as_one_by_one(monkeypatch):
    torch.manual_seed(1)
    steps = 3 * torch.randn(40, 4, 700)

    def draws() -> list[list[int]]:
        requests = [request(temperature=0.5 + seed, seed=seed) for seed in range(3)]
        requests.append(request(temperature=0.7, top_p=0.8, seed=7))
        return [[choice.token_id for choice in choose(step, requests)] for step in steps]

    at_once = draws()
    monkeypatch.setattr(logits_module, "draw", lambda _, rows, *__, **___: [None] * len(rows))
    assert draws() == at_once


def test_a_nucleus_wider_than_the_quick_look_is_still_whole():
    one = request(temperature=1.0, top_p=0.99, seed=5)
    # The first has 98.36 % of the mass; of the others, alike, 392 are needed to reach 99 %.
    logits_BV = torch.full((1, 1001), -11.0)
    logits_BV[0, 0] = 0.0
    drawn = {choose(logits_BV, [one])[0].token_id for _ in range(6000)}
    assert len(drawn) > 20 and max(drawn) <= 393
