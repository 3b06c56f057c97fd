"""One answer: its end, its text, and which log-probabilities belong to it."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.inference.engine.sequence import Choice, Finish, StopMatcher
from tests.unit.inference.sequences import Asked, ask, text_of

END = 99
# Of tokens 2 and 3.
STOP = text_of([2, 3])


def answer(tokens: list[int], **options: Any) -> Asked:
    asked = ask([1], stop_token_ids=[END], **options)
    for token in tokens:
        if not asked.sequence.is_done:
            asked.sequence.accept(Choice(token, -0.5))
    return asked


@pytest.mark.parametrize(
    ("tokens", "options", "shown", "end"),
    [
        # A stop token has no text.
        ([0, 1, END, 2], {}, [0, 1], Finish("stop", 3)),
        ([0, 1, 2, 3], {"max_tokens": 3}, [0, 1, 2], Finish("length", 3)),
        # A stop text across tokens is cut off and never sent.
        ([0, 1, 2, 3, 4], {"stop": (STOP,)}, [0, 1], Finish("stop", 4)),
        # What could begin a stop text is held back, and sent when the answer ends otherwise.
        ([0, 2, END], {"stop": (STOP,)}, [0, 2], Finish("stop", 3)),
        ([0, 2], {"stop": (STOP,), "max_tokens": 2}, [0, 2], Finish("length", 2)),
    ],
)
def test_an_answer_ends_at_its_length_a_stop_token_or_a_stop_text(tokens, options, shown, end):
    asked = answer(tokens, **options)
    assert (asked.token_ids, asked.events[-1]) == (shown, end)


def test_every_token_of_the_text_has_its_logprob_and_what_ends_it_has_none():
    asked = answer([0, 1, 2, 3, 4], stop=(STOP,), num_logprobs=0)
    held = [one for event in asked.events for one in getattr(event, "choices", ())]
    assert [(one.choice.token_id, one.start) for one in held] == [(0, 0), (1, 1)]
    assert [choice.token_id for choice in answer([0, END], num_logprobs=0).choices] == [0]


TEXTS = st.text(alphabet="ab\n#", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n#", min_size=1, max_size=4), max_size=4)


def match(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    released = []
    for piece in pieces:
        released.append(matcher.push(piece))
        if matcher.is_hit:
            return released, True
    return [*released, matcher.flush()], False


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=10))
def test_the_answer_ends_where_the_first_stop_text_begins_wherever_the_text_is_cut(text, stops, cuts):
    borders = sorted({0, len(text), *[cut for cut in cuts if cut < len(text)]})
    released, is_hit = match([text[start:end] for start, end in itertools.pairwise(borders)], stops)
    # The stop text that is complete first ends the answer; one piece may complete several.
    expected = None
    for end in borders[1:]:
        starts = [at for at in (text[:end].find(stop) for stop in stops) if at >= 0]
        if starts:
            expected = text[: min(starts)]
            break
    assert is_hit == (expected is not None)
    assert "".join(released) == (text if expected is None else expected)


@pytest.mark.parametrize(
    ("stops", "pieces", "released"),
    [
        (["END"], ["the E", "N", "Q", "EN", "D of it"], ["the ", "", "ENQ", "", ""]),
        (["END"], ["EN"], ["", "EN"]),
        ([], ["anything"], ["anything", ""]),
    ],
)
def test_text_is_held_back_while_it_could_begin_a_stop_text(stops, pieces, released):
    assert match(pieces, stops)[0] == released
