"""The engine over several runners: a fault of one ends no answer of another."""

from types import SimpleNamespace
from typing import Any

from luthier.inference.engine.engine import EngineCore
from luthier.inference.engine.sequence import Failure
from luthier.inference.engine.step import BatchExecutor
from luthier.modeling.protocols import RunnerLimits
from tests.unit.inference.test_engine import KEYS, MAX_ROWS, PLENTY, FakeRunner, ask, expected_answer

LIMITS = RunnerLimits("float32", 100, 256, 16, 16, 1, 8, 256, 264)


class _BrokenExecutor(BatchExecutor):
    """Has answers to make and fails at them."""

    def step(self) -> bool:
        raise RuntimeError("The block is gone.")


def test_a_fault_of_a_runner_ends_the_answers_of_that_runner_alone() -> None:
    core = EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    broken, sound = ask(KEYS[1], [3], 4), ask(KEYS[0], [5, 6], 4)
    runner: Any = SimpleNamespace(limits=LIMITS)
    broken.sequence.served = SimpleNamespace(executor=_BrokenExecutor(runner))
    for asked in (broken, sound):
        core.add(asked.sequence)
    while core.has_work:
        core.step()
    assert isinstance(broken.events[-1], Failure)
    assert sound.tokens == expected_answer(KEYS[0], [5, 6], 4)
