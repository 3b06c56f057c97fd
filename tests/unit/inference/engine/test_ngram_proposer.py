"""Drafts of an answer's next tokens: what is proposed, and that answers stay what they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from luthier.inference.engine.scheduler import NgramProposer, least_chance, room_for_drafts
from luthier.inference.engine.sequence import Finish
from luthier.inference.engine.step import BatchExecutor
from luthier_cpu.gemm.products import can_tile
from tests.unit.inference.artifacts import greedy, load_plain, pack
from tests.unit.inference.sequences import Asked, ask, run, text_of

NUM_TOKENS = 60
PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        # What followed the same tokens before.
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], 3, [4, 5, 6]),
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], 0, []),
        # The longest tokens that came before decide, and of equals the last.
        ([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3], 1, [7]),
        ([2, 3, 7, 0, 2, 3, 8, 1, 2, 3], 1, [8]),
        # What repeats at once is proposed round and round.
        ([9, 1, 2, 3, 1, 2, 3], 7, [1, 2, 3, 1, 2, 3, 1]),
        ([4, 4, 4], 3, [4, 4, 4]),
        # Nothing from nothing.
        ([], 9, []),
        ([1], 9, []),
        ([1, 2], 9, []),
        ([1, 2, 3, 4], 9, []),
        ([1, 2, 3, 2], 9, []),
        # A virtual token is never proposed.
        ([5, 6, -1, -2, 5, 6], 9, []),
        ([5, 6, 7, -1, 5, 6], 9, [7]),
    ],
)
def test_the_tokens_that_followed_before_are_proposed(tokens, most, expected):
    assert NgramProposer(tokens).propose(most, least_chance=lambda _: 0.0) == expected


def test_accepted_drafts_make_the_next_ones_longer_and_rejected_ones_shorter():
    proposer = NgramProposer([1, 2, 3, 1, 2])
    before = len(proposer.propose(9, least_chance=lambda _: 0.4))
    for token in (3, 1, 2, 3, 1, 2):
        proposer.add(token)
    after = len(proposer.propose(9, least_chance=lambda _: 0.4))
    assert before < after
    for other in (70, 71, 72):
        # It comes back to where a token is expected, and another one comes.
        for token in (other, 1, 2):
            proposer.add(token)
    assert len(proposer.propose(9, least_chance=lambda _: 0.4)) < after


def test_a_draft_must_be_the_likelier_the_more_tokens_run_at_once():
    chances = [least_chance(count) for count in range(1, 17)]
    # The second row alone is dearer: it takes what is made for one.
    assert chances[1:] == sorted(chances[1:]) and chances[0] > chances[1] > 0.1 and chances[-1] > 0.6
    proposer = NgramProposer([1, 2, 3, 1, 2])
    proposer.chance = 0.5
    assert proposer.propose(9, least_chance=lambda count: (0.5, 0.3, 0.1)[count]) == [3]
    assert proposer.propose(9, least_chance=lambda count: (0.5, 0.25, 0.13)[count]) == [3, 1]
    assert [room_for_drafts(count) for count in (1, 15, 16, 40)] == [15, 1, 0, 0]


@pytest.fixture(scope="module")
def expected(base_folder: Path) -> list[int]:
    """What the base says: it comes to repeat itself, or no draft is right."""
    answer = greedy(load_plain(base_folder), PROMPT, NUM_TOKENS)
    assert len(set(answer)) < len(answer) / 2
    return answer


def make_executor(
    base_folder: Path, *, max_cache_tokens: int = 2048, dtype: torch.dtype = torch.float32, **limits: int
) -> BatchExecutor:
    return pack(load_plain(base_folder).to(dtype), base_folder, max_cache_tokens=max_cache_tokens, **limits)


def complete(executor: BatchExecutor, max_tokens: int = NUM_TOKENS, **given: Any) -> Asked:
    """Return an answer of an executor that has nothing else to do."""
    asked = ask(PROMPT, max_tokens, **given)
    run(executor, asked)
    return asked


@pytest.mark.parametrize("max_tokens", [1, 2, 30, 31, 32, 33, 34, NUM_TOKENS])
def test_an_answer_is_the_same_in_fewer_steps_and_ends_where_it_should(base_folder, expected, max_tokens):
    steps = []
    for max_draft_tokens in (0, 7):
        executor = make_executor(base_folder, max_draft_tokens=max_draft_tokens)
        asked = complete(executor, max_tokens)
        assert asked.token_ids == expected[:max_tokens]
        assert asked.events[-1] == Finish("length", max_tokens)
        assert executor.measures.num_tokens == max_tokens
        steps.append(executor.measures.num_steps)
    assert steps[0] == max_tokens
    assert steps[1] < steps[0] or max_tokens < 3
    assert max_tokens < NUM_TOKENS or steps[1] < steps[0] / 2


def test_an_answer_that_ends_within_a_draft_ends_there(base_folder, expected):
    # A token that is far along, so that drafts around it are right.
    first_at = {token: expected.index(token) for token in expected}
    token, place = max(first_at.items(), key=lambda item: item[1])
    executor = make_executor(base_folder, max_draft_tokens=7)
    asked = complete(executor, stop_token_ids=[token])
    assert asked.token_ids == expected[:place]
    assert asked.events[-1] == Finish("stop", place + 1)
    stop = text_of(expected[40:43])
    assert complete(executor, stop=(stop,)).token_ids == expected[: text_of(expected).index(stop)]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5, "seed": 3},
        {"temperature": 0.3, "seed": 4, "top_p": 0.8},
        {"num_logprobs": 2},
        {"presence_penalty": 0.2, "frequency_penalty": 0.1},
        {"logit_bias": ((9, 1.0),)},
        {"num_prompt_logprobs": 0, "num_logprobs": 0},
    ],
)
def test_a_choice_is_made_when_the_token_before_it_is_known(base_folder, options):
    answers, logprobs = [], []
    for max_draft_tokens in (0, 7):
        executor = make_executor(base_folder, max_draft_tokens=max_draft_tokens)
        asked = complete(executor, **options)
        answers.append(asked.token_ids)
        logprobs.append([choice.logprob for choice in asked.choices])
        assert (executor.measures.num_drafts > 0) == (max_draft_tokens > 0)
    assert answers[0] == answers[1] and len(answers[0]) == NUM_TOKENS
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert len(logprobs[0]) == (NUM_TOKENS if "num_logprobs" in options else 0)


def test_a_grammar_decides_after_drafts_too(base_folder, monkeypatch):
    class Alternating:
        """Only even tokens after odd ones, and the other way round."""

        is_finished = False

        def __init__(self) -> None:
            self.last = 1

        def allows(self, token_id: int) -> bool:
            return token_id % 2 != self.last % 2

        def mask(self) -> npt.NDArray[np.bool_]:
            return np.arange(1000) % 2 != self.last % 2

        def push(self, token_id: int) -> None:
            assert self.allows(token_id)
            self.last = token_id

    def same(_: NgramProposer, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        return [one.tokens[-2] for one in executor.scheduler.running][:1] * min(most, 3)

    answers = []
    for max_draft_tokens in (0, 7):
        executor = make_executor(base_folder, max_draft_tokens=max_draft_tokens)
        if max_draft_tokens:
            monkeypatch.setattr(NgramProposer, "propose", same)
        answers.append(complete(executor, grammar=Alternating()).token_ids)
    assert answers[0] == answers[1] and len(answers[0]) == NUM_TOKENS
    assert executor.measures.num_drafts > 0


def test_rejected_drafts_are_in_no_block_that_is_shared(base_folder, expected, monkeypatch):
    def wrong(_: NgramProposer, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        return [1] * min(most, 5)

    executor = make_executor(base_folder, max_draft_tokens=7)
    with monkeypatch.context() as patch:
        patch.setattr(NgramProposer, "propose", wrong)
        assert complete(executor).token_ids == expected
    assert executor.measures.num_drafts > 100
    again = ask([*PROMPT, *expected[: NUM_TOKENS - 8]], 8)
    executor.scheduler.add(again.sequence)
    executor.step()
    # All but the last block came from the answer before.
    [running] = executor.scheduler.running
    assert running.table.num_cached >= 3
    run(executor)
    assert again.token_ids == expected[NUM_TOKENS - 8 :]


def test_drafts_take_no_block_that_another_sequence_needs(base_folder, expected, monkeypatch):
    def wrong(proposer: NgramProposer, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        return [1] * min(most, 7) if len(proposer._tokens) < len(PROMPT) + 6 else []

    monkeypatch.setattr(NgramProposer, "propose", wrong)
    # Each has one of three blocks; the one ahead needs the last past 16 tokens, and drafts would fill it.
    executor = make_executor(base_folder, max_draft_tokens=7, max_cache_tokens=32)
    ahead, behind = ask([*PROMPT, *expected[:6]], 14), ask(PROMPT, NUM_TOKENS)
    for asked in (ahead, behind):
        executor.scheduler.add(asked.sequence)
    while ahead.sequence.num_completion_tokens < 6:
        executor.step()
    assert executor.measures.num_preempted == 0 and len(executor.scheduler.running) == 2
    behind.sequence.cancel()
    run(executor)
    assert ahead.token_ids == expected[6:20]
    assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks


def test_drafts_that_can_not_be_run_end_no_answer(base_folder, expected, monkeypatch):
    executor = make_executor(base_folder, max_draft_tokens=7)
    step, failures = executor.runner.model.step, []

    def failing(chunks: list[Any], **how: Any) -> Any:
        if any(one.by_rows for one in chunks):
            failures.append(len(chunks))
            raise RuntimeError("the draft is broken")
        return step(chunks, **how)

    monkeypatch.setattr(executor.runner.model, "step", failing)
    asked = [ask(PROMPT, NUM_TOKENS) for _ in range(2)]
    run(executor, *asked)
    assert all(one.token_ids == expected for one in asked)
    assert failures and executor.measures.num_drafts == 0


@pytest.mark.skipif(
    not can_tile(torch.zeros(1, 32, dtype=torch.bfloat16)), reason="the processor has no products of pairs"
)
def test_a_program_of_steps_answers_with_drafts_as_without(base_folder):
    answers, steps = [], []
    for max_draft_tokens in (0, 7):
        executor = make_executor(base_folder, max_draft_tokens=max_draft_tokens, dtype=torch.bfloat16)
        assert executor.runner.model._programs is not None
        choices = complete(executor, num_logprobs=0).choices
        answers.append([(choice.token_id, choice.logprob) for choice in choices])
        steps.append(executor.measures.num_steps)
    # Of equally likely tokens rounding decides; up to there they are the same.
    same = [one for one, other in zip(*answers, strict=True) if one[0] == other[0]]
    assert len(same) > NUM_TOKENS / 2 and steps[1] < steps[0] * 0.8
    for (token, logprob), (other, other_logprob) in zip(*answers, strict=True):
        assert logprob == pytest.approx(other_logprob, abs=0.05)
        if token != other:
            break


def test_drafts_go_to_the_answers_whose_drafts_are_accepted_most(base_folder):
    executor = make_executor(base_folder, max_draft_tokens=7)
    for _ in range(4):
        executor.scheduler.add(ask(PROMPT, NUM_TOKENS).sequence)
    executor.step()
    repeated = [[1, 2, 3] * 4, [4, 5, 6] * 4, [7, 8, 9] * 4, [10, 11, 12] * 4]
    for one, tokens, chance in zip(executor.scheduler.running, repeated, (0.3, 0.99, 0.98, 0.3), strict=True):
        one._proposer = NgramProposer(tokens)
        one.proposer.chance = chance
    counts = [chunk.num_draft_tokens for _, chunk in executor.scheduler.schedule()]
    assert counts == [0, 7, 5, 0]
