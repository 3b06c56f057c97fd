"""Stop texts across any borders, against a plain search in the whole text."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from luthier.inference.engine.sequence import StopMatcher

TEXTS = st.text(alphabet="ab\n#", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n#", min_size=1, max_size=4), max_size=4)


def run(pieces: list[str], stops: list[str]) -> tuple[list[str], bool]:
    matcher = StopMatcher(stops)
    released = []
    for piece in pieces:
        released.append(matcher.push(piece))
        if matcher.is_hit:
            return released, True
    released.append(matcher.flush())
    return released, False


@given(text=TEXTS, stops=STOPS, cuts=st.lists(st.integers(0, 30), max_size=10))
def test_the_answer_ends_where_the_first_stop_text_begins(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = sorted({0, len(text), *[cut for cut in cuts if cut < len(text)]})
    pieces = [text[start:end] for start, end in itertools.pairwise(borders)]
    released, is_hit = run(pieces, stops)
    # The stop text that is complete first ends the answer; one piece may complete several.
    expected = None
    for end in borders[1:]:
        starts = [at for at in (text[:end].find(stop) for stop in stops) if at >= 0]
        if starts:
            expected = text[: min(starts)]
            break
    assert is_hit == (expected is not None)
    assert "".join(released) == (text if expected is None else expected)


def test_text_that_could_begin_a_stop_text_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == "the "
    assert matcher.push("N") == ""
    assert matcher.push("Q") == "ENQ"
    assert matcher.push("EN") == ""
    assert matcher.push("D of it") == ""
    assert matcher.is_hit


def test_what_is_held_back_comes_out_at_the_end() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("EN") == ""
    assert matcher.flush() == "EN"
    assert not matcher.is_hit


def test_without_stop_texts_nothing_is_held_back() -> None:
    assert StopMatcher([]).push("anything") == "anything"
