"""Guesses of an answer's next tokens: what is guessed, and that answers stay what they were."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from luthier.inference.engine.scheduler import NgramProposer, least_chance, room_for_drafts
from luthier.inference.engine.sequence import (
    Finish,
    ModelKey,
    Piece,
    SamplingOptions,
    Sequence,
    SequenceEvent,
)
from luthier.inference.engine.step import BatchExecutor
from luthier_cpu.decode.batch import Chunk
from luthier_cpu.gemm.products import can_tile
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import greedy, load_plain, pack
from tests.unit.inference.engine.test_scheduler import Ids, ServedStub, run_dry

NUM_TOKENS = 60
PROMPT = [5, 6, 7, 8, 9, 10, 11]


def always(_: int) -> float:
    return 0.0


def test_what_followed_the_same_tokens_before_is_guessed() -> None:
    proposer = NgramProposer([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert proposer.propose(3, least_chance=always) == [4, 5, 6]
    assert proposer.propose(0, least_chance=always) == []


def test_the_longest_tokens_that_came_before_decide_and_of_equals_the_last() -> None:
    assert NgramProposer([1, 2, 3, 7, 0, 2, 3, 8, 1, 2, 3]).propose(1, least_chance=always) == [7]
    assert NgramProposer([2, 3, 7, 0, 2, 3, 8, 1, 2, 3]).propose(1, least_chance=always) == [8]


def test_what_repeats_at_once_is_guessed_round_and_round() -> None:
    assert NgramProposer([9, 1, 2, 3, 1, 2, 3]).propose(7, least_chance=always) == [1, 2, 3, 1, 2, 3, 1]
    assert NgramProposer([4, 4, 4]).propose(3, least_chance=always) == [4, 4, 4]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 2]])
def test_nothing_is_guessed_from_nothing(tokens: list[int]) -> None:
    assert NgramProposer(tokens).propose(9, least_chance=always) == []


def test_a_token_that_has_no_meaning_is_never_guessed() -> None:
    proposer = NgramProposer([5, 6, -1, -2, 5, 6])
    assert proposer.propose(9, least_chance=always) == []
    assert NgramProposer([5, 6, 7, -1, 5, 6]).propose(9, least_chance=always) == [7]


def test_guesses_that_were_right_let_more_be_guessed_and_wrong_ones_fewer() -> None:
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


def test_a_guess_must_be_the_likelier_the_more_rows_there_are() -> None:
    chances = [least_chance(count) for count in range(1, 17)]
    # The second row alone is dearer: it takes what is made for one.
    assert chances[1:] == sorted(chances[1:]) and chances[0] > chances[1] > 0.1 and chances[-1] > 0.6
    proposer = NgramProposer([1, 2, 3, 1, 2])
    proposer.chance = 0.5
    assert proposer.propose(9, least_chance=lambda count: (0.5, 0.3, 0.1)[count]) == [3]
    assert proposer.propose(9, least_chance=lambda count: (0.5, 0.25, 0.13)[count]) == [3, 1]
    assert [room_for_drafts(count) for count in (1, 15, 16, 40)] == [15, 1, 0, 0]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


@pytest.fixture(scope="module")
def expected(base_folder: Path) -> list[int]:
    """What the base says: it comes to repeat itself, or nothing is right to guess."""
    answer = greedy(load_plain(base_folder), PROMPT, NUM_TOKENS)
    assert len(set(answer)) < len(answer) / 2
    return answer


def make_executor(base_folder: Path, *, max_draft_tokens: int, max_cache_tokens: int = 2048) -> BatchExecutor:
    limits = {"max_rows": 4, "max_cache_tokens": max_cache_tokens, "max_draft_tokens": max_draft_tokens}
    return pack(load_plain(base_folder), base_folder, **limits)


def ask(
    options: SamplingOptions, stops: frozenset[int] = frozenset()
) -> tuple[Sequence, list[SequenceEvent]]:
    events: list[SequenceEvent] = []
    return (
        Sequence(
            key=ModelKey((BASE_ID, None)),
            served=ServedStub(None),
            prompt_ids=PROMPT,
            options=options,
            decoder=Ids(),
            stop_token_ids=stops,
            emit=events.append,
        ),
        events,
    )


def text_of(events: list[SequenceEvent]) -> list[int]:
    return [ord(one) - 0x4E00 for event in events for one in getattr(event, "text", "")]


def plain(max_tokens: int, **options: object) -> SamplingOptions:
    return SamplingOptions(**({"max_tokens": max_tokens, "temperature": 0.0} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("max_tokens", [1, 2, 30, 31, 32, 33, 34, NUM_TOKENS])
def test_an_answer_is_the_same_in_fewer_steps_and_ends_where_it_should(
    base_folder: Path, expected: list[int], max_tokens: int
) -> None:
    steps = []
    for max_draft_tokens in (0, 7):
        executor = make_executor(base_folder, max_draft_tokens=max_draft_tokens)
        sequence, events = ask(plain(max_tokens))
        executor.scheduler.add(sequence)
        run_dry(executor)
        assert text_of(events) == expected[:max_tokens]
        assert events[-1] == Finish("length", max_tokens)
        assert executor.measures.num_tokens == max_tokens
        steps.append(executor.measures.num_steps)
    assert steps[0] == max_tokens
    assert steps[1] < steps[0] or max_tokens < 3
    assert max_tokens < NUM_TOKENS or steps[1] < steps[0] / 2


def test_an_answer_that_ends_among_guesses_ends_there(base_folder: Path, expected: list[int]) -> None:
    # A token that is far along, so that guesses around it are right.
    first_at = {token: expected.index(token) for token in expected}
    token, place = max(first_at.items(), key=lambda item: item[1])
    executor = make_executor(base_folder, max_draft_tokens=7)
    sequence, events = ask(plain(NUM_TOKENS), frozenset({token}))
    executor.scheduler.add(sequence)
    run_dry(executor)
    assert text_of(events) == expected[:place]
    assert events[-1] == Finish("stop", place + 1)
    stop = "".join(chr(0x4E00 + one) for one in expected[40:43])
    whole = "".join(chr(0x4E00 + one) for one in expected)
    sequence, events = ask(plain(NUM_TOKENS, stop=(stop,)))
    executor.scheduler.add(sequence)
    run_dry(executor)
    assert text_of(events) == expected[: whole.index(stop)]


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
def test_a_choice_is_made_when_the_token_before_it_is_known(
    base_folder: Path, options: dict[str, object]
) -> None:
    told, logprobs = [], []
    for max_draft_tokens in (0, 7):
        executor = make_executor(base_folder, max_draft_tokens=max_draft_tokens)
        sequence, events = ask(plain(NUM_TOKENS, **options))
        executor.scheduler.add(sequence)
        run_dry(executor)
        told.append(text_of(events))
        held = [one.choice for event in events if isinstance(event, Piece) for one in event.choices]
        logprobs.append([choice.logprob for choice in held])
        assert (executor.measures.num_drafts > 0) == (max_draft_tokens > 0)
    assert told[0] == told[1] and len(told[0]) == NUM_TOKENS
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)
    assert len(logprobs[0]) == (NUM_TOKENS if "num_logprobs" in options else 0)


def test_a_grammar_decides_after_guesses_too(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        return [row.tokens[-2] for row in executor.scheduler.running][:1] * min(most, 3)

    told = []
    for max_draft_tokens in (0, 7):
        executor = make_executor(base_folder, max_draft_tokens=max_draft_tokens)
        events: list[SequenceEvent] = []
        sequence, _ = ask(plain(NUM_TOKENS))
        sequence.emit, sequence.grammar = events.append, Alternating()
        sequence.is_plainly_greedy = False
        if max_draft_tokens:
            monkeypatch.setattr(NgramProposer, "propose", same)
        executor.scheduler.add(sequence)
        run_dry(executor)
        told.append(text_of(events))
    assert told[0] == told[1] and len(told[0]) == NUM_TOKENS
    assert executor.measures.num_drafts > 0


def test_wrong_guesses_are_in_no_page_that_is_shared(
    base_folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(_: NgramProposer, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        return [1] * min(most, 5)

    executor = make_executor(base_folder, max_draft_tokens=7)
    with monkeypatch.context() as patch:
        patch.setattr(NgramProposer, "propose", wrong)
        sequence, events = ask(plain(NUM_TOKENS))
        executor.scheduler.add(sequence)
        run_dry(executor)
    assert text_of(events) == expected
    assert executor.measures.num_drafts > 100
    again, events = ask(plain(8))
    again.prompt_ids = [*PROMPT, *expected[: NUM_TOKENS - 8]]
    executor.scheduler.add(again)
    executor.step()
    # All but the last page came from the answer before.
    [row] = executor.scheduler.running
    assert row.table.num_cached >= 3
    run_dry(executor)
    assert text_of(events) == expected[NUM_TOKENS - 8 :]


def test_guesses_take_no_page_that_another_row_needs(
    base_folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(proposer: NgramProposer, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        return [1] * min(most, 7) if len(proposer._tokens) < len(PROMPT) + 6 else []

    monkeypatch.setattr(NgramProposer, "propose", wrong)
    # Of three pages each has one. Who is ahead needs the last past 16 tokens; the other would guess into it.
    executor = make_executor(base_folder, max_draft_tokens=7, max_cache_tokens=32)
    (ahead, events), (behind, _) = ask(plain(14)), ask(plain(NUM_TOKENS))
    ahead.prompt_ids = [*PROMPT, *expected[:6]]
    for sequence in (ahead, behind):
        executor.scheduler.add(sequence)
    while ahead.num_completion_tokens < 6:
        executor.step()
    assert executor.measures.num_preempted == 0 and len(executor.scheduler.running) == 2
    behind.cancel()
    run_dry(executor)
    assert text_of(events) == expected[6:20]
    assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks


def test_guesses_that_can_not_be_run_end_nobodys_answer(
    base_folder: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make_executor(base_folder, max_draft_tokens=7)
    step, failures = executor.runner.model.step, []

    def failing(chunks: list[Chunk], **how: object) -> object:
        if any(one.by_rows for one in chunks):
            failures.append(len(chunks))
            raise RuntimeError("the guess is broken")
        return step(chunks, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(executor.runner.model, "step", failing)
    asked = [ask(plain(NUM_TOKENS)) for _ in range(2)]
    for sequence, _ in asked:
        executor.scheduler.add(sequence)
    run_dry(executor)
    assert all(text_of(events) == expected for _, events in asked)
    assert failures and executor.measures.num_drafts == 0


@pytest.mark.skipif(
    not can_tile(torch.zeros(1, 32, dtype=torch.bfloat16)), reason="the processor has no products of pairs"
)
def test_a_program_of_steps_answers_with_guesses_as_without(base_folder: Path) -> None:
    told, steps = [], []
    for max_draft_tokens in (0, 7):
        limits = {"max_rows": 4, "max_cache_tokens": 2048, "max_draft_tokens": max_draft_tokens}
        executor = pack(load_plain(base_folder).bfloat16(), base_folder, **limits)
        assert executor.runner.model._programs is not None
        sequence, events = ask(plain(NUM_TOKENS, num_logprobs=0))
        executor.scheduler.add(sequence)
        run_dry(executor)
        held = [one.choice for event in events if isinstance(event, Piece) for one in event.choices]
        told.append([(choice.token_id, choice.logprob) for choice in held])
        steps.append(executor.measures.num_steps)
    # Of equally likely tokens rounding decides; up to there they are the same.
    same = [one for one, other in zip(*told, strict=True) if one[0] == other[0]]
    assert len(same) > NUM_TOKENS / 2 and steps[1] < steps[0] * 0.8
    for (token, logprob), (other, other_logprob) in zip(*told, strict=True):
        assert logprob == pytest.approx(other_logprob, abs=0.05)
        if token != other:
            break


def test_guesses_go_to_the_answers_that_are_guessed_best(base_folder: Path) -> None:
    executor = make_executor(base_folder, max_draft_tokens=7)
    asked = [ask(plain(NUM_TOKENS)) for _ in range(4)]
    for sequence, _ in asked:
        executor.scheduler.add(sequence)
    executor.step()
    repeated = [[1, 2, 3] * 4, [4, 5, 6] * 4, [7, 8, 9] * 4, [10, 11, 12] * 4]
    for row, tokens, chance in zip(executor.scheduler.running, repeated, (0.3, 0.99, 0.98, 0.3), strict=True):
        row._proposer = NgramProposer(tokens)
        row.proposer.chance = chance
    counts = [chunk.num_draft_tokens for _, chunk in executor.scheduler.schedule()]
    assert counts == [0, 7, 5, 0]
