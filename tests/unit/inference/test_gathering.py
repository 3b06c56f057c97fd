"""Requests that come together are begun together."""

import threading
from typing import Any, cast

import pytest

from luthier.inference import engine as engine_module
from luthier.inference.engine import Engine, EngineCore
from luthier.inference.sequence import SamplingOptions, Sequence


class _Core:
    """Does all that came at once, and notes how many that were."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.steps: list[int] = []
        self.has_stepped = threading.Event()

    @property
    def has_work(self) -> bool:
        return bool(self.waiting)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def step(self) -> bool:
        self.steps.append(len(self.waiting))
        self.waiting.clear()
        self.has_stepped.set()
        return True

    def drain(self) -> list[Sequence]:
        return self.waiting


def make_sequence() -> Sequence:
    nothing: Any = None
    options = SamplingOptions(max_tokens=1)
    return Sequence(("base", None), None, [1], options, nothing, frozenset(), lambda _: None)


@pytest.mark.parametrize("are_expected", [True, False])
def test_who_is_expected_is_run_with_the_first(are_expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough for any machine: an engine that expects nobody must not wait at all.
    monkeypatch.setattr(engine_module, "_GATHER_SECONDS", 3600.0)
    core = _Core()
    engine = Engine(cast(EngineCore, core), max_waiting=9)
    engine.start()
    try:
        if are_expected:
            with engine.expecting():
                engine.submit([make_sequence()])
                assert not core.has_stepped.wait(0.05)
                engine.submit([make_sequence()])
        else:
            engine.submit([make_sequence()])
        assert core.has_stepped.wait(30)
    finally:
        engine.close()
        engine.join(timeout_seconds=10)
    assert core.steps[0] == (2 if are_expected else 1)


def test_an_idle_engine_waits_for_a_moment_at_most() -> None:
    core = _Core()
    engine = Engine(cast(EngineCore, core), max_waiting=9)
    engine.start()
    try:
        with engine.expecting():
            engine.submit([make_sequence()])
            assert core.has_stepped.wait(30)
    finally:
        engine.close()
        engine.join(timeout_seconds=10)
    assert core.steps[0] == 1
