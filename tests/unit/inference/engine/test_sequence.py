"""One answer: its end, its text, and which log-probabilities belong to it."""

from typing import Any

from luthier.inference.engine.sequence import Choice, Finish, Piece, SamplingOptions, Sequence, SequenceEvent

END = 99


class _Letters:
    """Token 0 is `a`, 1 is `b`, and so on."""

    def push(self, token_id: int) -> str:
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return ""


def answer(tokens: list[int], **options: Any) -> list[SequenceEvent]:
    events: list[SequenceEvent] = []
    sequence = Sequence(
        key=("base", None),
        served=None,
        prompt_ids=[1],
        options=SamplingOptions(**({"max_tokens": 100} | options)),
        decoder=_Letters(),
        stop_token_ids=frozenset({END}),
        emit=events.append,
    )
    for token in tokens:
        if not sequence.is_done:
            sequence.accept(Choice(token, -0.5))
    return events


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
