"""Projects take turns, in each its models do, and a preempted sequence comes first."""

import gc
import weakref

from luthier.inference.engine.scheduler import FairQueue, WaitingShares
from luthier.inference.engine.sequence import Sequence
from tests.unit.inference.sequences import ask


def make(*names: str) -> list[Sequence]:
    """Make a sequence for each name, of a project or of `project/model`."""
    parts = [name.partition("/") for name in names]
    return [ask([1], project_id=project, model=model or "m").sequence for project, _, model in parts]


def fill(*sequences: Sequence) -> FairQueue:
    queue = FairQueue()
    for sequence in sequences:
        queue.add(sequence)
    return queue


def take_all(queue: FairQueue) -> list[Sequence]:
    taken = []
    while queue.peek() is not None:
        taken.append(queue.pop())
    return taken


def test_one_projects_crowd_holds_up_another_by_one_turn():
    *crowd, single = sequences = make("a", "a", "a", "b")
    queue = fill(*sequences)
    assert len(queue) == 4
    assert take_all(queue) == [crowd[0], single, crowd[1], crowd[2]]


def test_the_models_of_a_project_take_turns():
    first, second, other = make("a", "a", "a/n")
    assert take_all(fill(first, second, other)) == [first, other, second]


def test_a_preempted_sequence_is_served_before_all_others():
    first, returned = make("a", "b")
    queue = fill(first)
    queue.add_first(returned)
    assert take_all(queue) == [returned, first]


def test_cancelled_ones_are_passed_over():
    gone, lost, here = make("a", "a", "b")
    queue = fill(gone, here)
    queue.add_first(lost)
    gone.cancel()
    lost.cancel()
    assert take_all(queue) == [here]
    queue.add(here)
    assert len(queue) == 1 and queue.drain() == [here]
    assert not queue and len(queue) == 0


def test_cancelled_ones_count_no_longer_wherever_they_stand():
    first, gone, lost, other = make("a", "a", "b", "c")
    queue = fill(first, gone, other)
    queue.add_first(lost)
    gone.cancel()
    other.cancel()
    queue.drop_done()
    assert len(queue) == 2
    assert take_all(queue) == [lost, first]


def test_the_count_of_waiting_requests_keeps_no_sequence_and_so_no_weights():
    shares = WaitingShares(4)
    [sequence] = make("a")
    gone = weakref.ref(sequence)
    shares.take([sequence], 0)
    del sequence
    gc.collect()
    assert gone() is None
