"""Projects take turns, in each its models do, and whoever lost a row comes first."""

import gc
import weakref
from typing import Any

from luthier.inference.engine.scheduler import FairQueue, WaitingShares
from luthier.inference.engine.sequence import SamplingOptions, Sequence


def make_sequence(project: str, model: str = "m") -> Sequence:
    nothing: Any = None
    return Sequence(
        key=("base", model),
        served=nothing,
        prompt_ids=[1],
        options=SamplingOptions(max_tokens=1),
        decoder=nothing,
        stop_token_ids=frozenset(),
        emit=lambda _: None,
        project_id=project,
    )


def take_all(line: FairQueue) -> list[Sequence]:
    taken = []
    while line.peek() is not None:
        taken.append(line.pop())
    return taken


def test_one_projects_crowd_holds_up_another_by_one_turn() -> None:
    line = FairQueue()
    crowd, single = [make_sequence("a") for _ in range(3)], make_sequence("b")
    for sequence in (*crowd, single):
        line.add(sequence)
    assert len(line) == 4
    assert take_all(line) == [crowd[0], single, crowd[1], crowd[2]]


def test_the_models_of_a_project_take_turns() -> None:
    line = FairQueue()
    first, second, other = make_sequence("a"), make_sequence("a"), make_sequence("a", "n")
    for sequence in (first, second, other):
        line.add(sequence)
    assert take_all(line) == [first, other, second]


def test_whoever_lost_a_row_is_served_before_all_others() -> None:
    line = FairQueue()
    first, returned = make_sequence("a"), make_sequence("b")
    line.add(first)
    line.add_first(returned)
    assert take_all(line) == [returned, first]


def test_those_that_left_are_passed_over() -> None:
    line = FairQueue()
    gone, lost, here = make_sequence("a"), make_sequence("a"), make_sequence("b")
    line.add(gone)
    line.add(here)
    line.add_first(lost)
    gone.cancel()
    lost.cancel()
    assert take_all(line) == [here]
    line.add(here)
    assert len(line) == 1 and line.drain() == [here]
    assert not line and len(line) == 0


def test_those_that_left_count_no_longer_wherever_they_stand() -> None:
    line = FairQueue()
    first, gone, lost, other = (make_sequence(project) for project in ("a", "a", "b", "c"))
    for sequence in (first, gone, other):
        line.add(sequence)
    line.add_first(lost)
    gone.cancel()
    other.cancel()
    line.drop_done()
    assert len(line) == 2
    assert take_all(line) == [lost, first]


def test_the_count_of_who_waits_keeps_no_sequence_and_so_no_weights() -> None:
    shares = WaitingShares(4)
    sequence = make_sequence("a")
    gone = weakref.ref(sequence)
    shares.take([sequence], 0)
    del sequence
    gc.collect()
    assert gone() is None
