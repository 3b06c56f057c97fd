"""Answers while training: what a cache of keys and values gives is what reading everything again gives."""

import pytest
import torch

from luthier.methods import Attached, Method
from luthier.training.samples import MAX_NEW_TOKENS, generate
from luthier.training.stopping import StoppedError
from tests.tiny_methods import DEFAULTS, LLAMA, Bench, Case
from tests.tiny_shapes import NUM_POSITIONS

PROMPT = [1, 40, 41, 50, 60, 45]


@torch.no_grad()
def read_again(method: Method, attached: Attached, *, length: int, stops: frozenset[int]) -> list[int]:
    """Go on from the prompt by the method's plain path, the whole sequence for every token."""
    generated: list[int] = []
    while len(generated) < length:
        logits_BTV = method.logits(attached, torch.tensor([[*PROMPT, *generated]]))
        token_id = int(logits_BTV[0, -1].argmax())
        if token_id in stops:
            break
        generated.append(token_id)
    return generated


@torch.no_grad()
def answer(
    method: Method, attached: Attached, *, stops: frozenset[int] = frozenset(), num_calls: int = 1000
) -> list[int]:
    """Go on from the prompt as a sample answer does; TERM comes after some tokens."""
    calls = iter(range(num_calls))
    return generate(
        method,
        attached,
        PROMPT,
        context_length=NUM_POSITIONS,
        stop_token_ids=stops,
        should_stop=lambda: next(calls, None) is None,
    )


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_an_answer_is_what_the_plain_path_gives_token_by_token(case: Case, bench: Bench) -> None:
    trainee = bench.trained(case)
    found = answer(trainee.method, trainee.attached)
    expected = read_again(trainee.method, trainee.attached, length=len(found), stops=frozenset())
    assert found == expected
    # Virtual tokens, prompt and answer share the context.
    assert 32 <= len(found) <= MAX_NEW_TOKENS


@pytest.mark.parametrize("case", [case for case in DEFAULTS if case.shape == LLAMA], ids=str)
def test_an_answer_ends_before_a_token_that_stops_it_and_when_it_is_asked_to(
    case: Case, bench: Bench
) -> None:
    method, attached = bench.attach(case)
    whole = answer(method, attached)
    stop = whole[10]
    assert answer(method, attached, stops=frozenset({stop})) == whole[: whole.index(stop)]
    with pytest.raises(StoppedError):
        answer(method, attached, num_calls=5)
