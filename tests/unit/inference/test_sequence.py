"""One answer: its end, its text, and which log-probabilities belong to it."""

from typing import Any

import pytest

from luthier.core.errors import UnavailableError
from luthier.inference.sequence import (
    Choice,
    Failure,
    Finish,
    Piece,
    SamplingOptions,
    Sequence,
    SequenceEvent,
)

END = 99


class _Letters:
    """Token 0 is `a`, 1 is `b`, and so on."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return ""


def answer(tokens: list[int], **options: Any) -> list[SequenceEvent]:
    events: list[SequenceEvent] = []
    sequence = begin(events, **options)
    for token in tokens:
        if not sequence.is_done:
            sequence.accept(Choice(token, -0.5))
    return events


def begin(events: list[SequenceEvent], *, is_told_whole: bool = False, **options: Any) -> Sequence:
    return Sequence(
        key=("base", None),
        served=None,
        prompt_ids=[1],
        options=SamplingOptions(**({"max_tokens": 100} | options)),
        decoder=_Letters(),
        stop_token_ids=frozenset({END}),
        emit=events.append,
        is_told_whole=is_told_whole,
    )


def text(events: list[SequenceEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Piece))


def test_a_stop_token_ends_the_answer_and_has_no_text() -> None:
    events = answer([0, 1, END, 2])
    assert text(events) == "ab"
    assert events[-1] == Finish("stop", 3)


def test_an_answer_at_its_length_says_so() -> None:
    events = answer([0, 1, 2, 3], max_tokens=3)
    assert text(events) == "abc"
    assert events[-1] == Finish("length", 3)


def test_a_stop_text_across_tokens_is_cut_off_and_never_sent() -> None:
    events = answer([0, 1, 2, 3, 4], stop=("cd",))
    assert text(events) == "ab"
    assert events[-1] == Finish("stop", 4)


def test_held_back_text_is_sent_when_the_answer_ends_otherwise() -> None:
    assert text(answer([0, 2, END], stop=("cd",))) == "ac"
    events = answer([0, 2], stop=("cd",), max_tokens=2)
    assert text(events) == "ac"
    assert events[-1] == Finish("length", 2)


def test_every_token_of_the_text_and_none_of_the_stop_text_has_its_logprob() -> None:
    events = answer([0, 1, 2, 3, 4], stop=("cd",), num_logprobs=0)
    choices = [held for event in events if isinstance(event, Piece) for held in event.choices]
    assert [(held.choice.token_id, held.start) for held in choices] == [(0, 0), (1, 1)]


def test_the_stop_token_has_no_logprob() -> None:
    events = answer([0, END], num_logprobs=0)
    choices = [held for event in events if isinstance(event, Piece) for held in event.choices]
    assert [held.choice.token_id for held in choices] == [0]


def accept_at(sequence: Sequence, moments: list[float], *, gap_seconds: float) -> None:
    """Give it the tokens a, b, c and so on, each at its moment."""
    for token, moment in enumerate(moments):
        sequence.last_token_at = moment
        sequence.accept(Choice(token, -0.5), gap_seconds)


def pieces(events: list[SequenceEvent]) -> list[str]:
    return [event.text for event in events if isinstance(event, Piece)]


def test_the_first_token_is_told_at_once_and_later_ones_wait_for_the_gap() -> None:
    events: list[SequenceEvent] = []
    sequence = begin(events, num_logprobs=0)
    accept_at(sequence, [10.0, 10.25, 10.5, 10.75, 11.0], gap_seconds=0.5)
    assert pieces(events) == ["a", "bc", "de"]
    told = [[held.start for held in event.choices] for event in events if isinstance(event, Piece)]
    assert told == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize(("options", "last"), [({"max_tokens": 3}, Finish("length", 3)), ({}, None)])
def test_text_that_waits_is_told_when_the_answer_ends_or_fails(options: dict[str, Any], last: Any) -> None:
    events: list[SequenceEvent] = []
    sequence = begin(events, **options)
    accept_at(sequence, [10.0, 10.01, 10.02], gap_seconds=1.0)
    error = UnavailableError("The step failed.")
    sequence.fail(error)
    assert pieces(events) == ["a", "bc"]
    assert events[-1] == (last or Failure(error))


def test_an_answer_that_loses_its_row_is_told_what_waits() -> None:
    events: list[SequenceEvent] = []
    sequence = begin(events)
    accept_at(sequence, [10.0, 10.01], gap_seconds=1.0)
    sequence.tell_held()
    assert pieces(events) == ["a", "b"]
    sequence.tell_held()
    assert pieces(events) == ["a", "b"]


def test_an_answer_that_nobody_reads_before_its_end_is_one_piece() -> None:
    events: list[SequenceEvent] = []
    sequence = begin(events, is_told_whole=True, max_tokens=3)
    accept_at(sequence, [10.0, 11.0, 12.0], gap_seconds=0.0)
    assert events == [Piece("abc"), Finish("length", 3)]


def test_a_stop_text_behind_text_that_waits_is_cut_off_all_the_same() -> None:
    events: list[SequenceEvent] = []
    sequence = begin(events, stop=("de",))
    accept_at(sequence, [10.0, 10.01, 10.02, 10.03, 10.04], gap_seconds=1.0)
    assert pieces(events) == ["a", "bc"]
    assert events[-1] == Finish("stop", 5)
