"""Answers while training: what a cache of keys and values gives is what reading everything again gives."""

import pytest
import torch

from luthier.methods import Attached, Method
from luthier.training.loop.sample_answers import MAX_NEW_TOKENS, generate
from luthier.training.process_io import StoppedError
from tests.tiny_methods import DEFAULTS, LLAMA, Bench, Case
from tests.tiny_shapes import NUM_POSITIONS

# Of different lengths, so that answers side by side have different positions.
PROMPTS = [[1, 40, 41, 50, 60, 45], [1, 7, 9], [1, 30, *range(60, 100, 3)]]


@torch.no_grad()
def read_again(method: Method, attached: Attached, prompt: list[int], length: int) -> list[int]:
    """Continue a prompt by the method's plain path, the whole sequence for every token."""
    generated: list[int] = []
    while len(generated) < length:
        logits_BTV = method.logits(attached, torch.tensor([[*prompt, *generated]]))
        generated.append(int(logits_BTV[0, -1].argmax()))
    return generated


@torch.no_grad()
def answers_of(
    method: Method, attached: Attached, *, stops: frozenset[int] = frozenset(), num_calls: int = 1000
) -> list[list[int]]:
    """Continue the prompts as sample answers do; TERM comes after some tokens."""
    calls = iter(range(num_calls))
    return generate(
        method,
        attached,
        PROMPTS,
        context_length=NUM_POSITIONS,
        stop_token_ids=stops,
        should_stop=lambda: next(calls, None) is None,
    )


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_answers_are_what_the_plain_path_gives_token_by_token(case: Case, bench: Bench) -> None:
    job_model = bench.trained(case)
    method, attached = job_model.method, job_model.attached
    found = answers_of(method, attached)
    assert found == [
        read_again(method, attached, prompt, len(answer))
        for prompt, answer in zip(PROMPTS, found, strict=True)
    ]
    # Virtual tokens, prompt and answer share the context.
    num_virtual = num_virtual_tokens(method, attached)
    assert [len(answer) for answer in found] == [
        min(MAX_NEW_TOKENS, NUM_POSITIONS - num_virtual - len(prompt)) for prompt in PROMPTS
    ]


def num_virtual_tokens(method: Method, attached: Attached) -> int:
    pairs, embeddings = method.virtual_key_values(attached), method.virtual_embeddings(attached)
    return (0 if pairs is None else pairs[0][0].shape[1]) + (0 if embeddings is None else len(embeddings))


@pytest.mark.parametrize("case", [case for case in DEFAULTS if case.shape == LLAMA], ids=str)
def test_an_answer_ends_before_a_token_that_stops_it_and_the_others_continue(
    case: Case, bench: Bench
) -> None:
    method, attached = bench.attach(case)
    whole = answers_of(method, attached)
    stop = whole[0][10]
    expected = [answer[: answer.index(stop)] if stop in answer else answer for answer in whole]
    assert answers_of(method, attached, stops=frozenset({stop})) == expected


def test_answers_end_at_the_end_of_the_context(bench: Bench) -> None:
    # Learned positions end there too.
    method, attached = bench.attach(Case("gpt2", {"type": "lora"}))
    prompts = [[1, *range(3, 100)], [1] * (NUM_POSITIONS - 1), [1] * NUM_POSITIONS]
    with torch.no_grad():
        found = generate(
            method,
            attached,
            prompts,
            context_length=NUM_POSITIONS,
            stop_token_ids=frozenset(),
            should_stop=lambda: False,
        )
    assert [len(answer) for answer in found] == [NUM_POSITIONS - 98, 1, 0]


@pytest.mark.parametrize("num_calls", [0, 2, 3, 10])
def test_answers_stop_when_asked_to(num_calls: int, bench: Bench) -> None:
    method, attached = bench.attach(Case(LLAMA, {"type": "lora"}))
    with pytest.raises(StoppedError):
        answers_of(method, attached, num_calls=num_calls)
