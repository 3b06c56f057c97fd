"""The engine over lanes of packed models: a fault of one is nobody else's."""

from dataclasses import dataclass
from typing import Any

from luthier.inference.engine.engine import EngineCore
from luthier.inference.engine.sequence import Failure, Sequence
from tests.unit.inference.test_engine import KEYS, MAX_ROWS, PLENTY, FakeRunner, ask, expected_answer


class _BrokenLane:
    """Has one answer to make and fails at it."""

    num_waiting = num_rows = 0
    measures: Any = None

    def __init__(self) -> None:
        self.added: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.added)

    def add(self, sequence: Sequence) -> None:
        self.added.append(sequence)

    def step(self) -> bool:
        raise RuntimeError("The page is gone.")

    def drain(self) -> list[Sequence]:
        drained, self.added = self.added, []
        return drained


@dataclass(frozen=True)
class _InLane:
    lane: _BrokenLane


def test_a_fault_of_a_lane_ends_its_answers_and_nobody_elses() -> None:
    core = EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    broken, sound = ask(KEYS[1], [3], 4), ask(KEYS[0], [5, 6], 4)
    broken.sequence.served = _InLane(_BrokenLane())
    for asked in (broken, sound):
        core.add(asked.sequence)
    while core.has_work:
        core.step()
    assert isinstance(broken.events[-1], Failure)
    assert sound.tokens == expected_answer(KEYS[0], [5, 6], 4)
