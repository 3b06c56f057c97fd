"""Requests that come together are begun together."""

import threading

import pytest

from luthier.inference.engine import engine as engine_module
from luthier.inference.engine.engine import Engine, EngineCore
from luthier.inference.engine.sequence import Sequence
from tests.unit.inference.test_engine import KEYS, MAX_ROWS, PLENTY, FakeRunner, ask


class _Core(EngineCore):
    """Tells of its first step, and how many had come by then."""

    def __init__(self) -> None:
        super().__init__(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
        self.has_stepped = threading.Event()
        self.num_first = 0

    def step(self) -> bool:
        if not self.has_stepped.is_set():
            self.num_first = self.num_waiting
            self.has_stepped.set()
        return super().step()


def one() -> list[Sequence]:
    return [ask(KEYS[0], [1], 2).sequence]


@pytest.mark.parametrize("are_expected", [True, False])
def test_who_is_expected_is_run_with_the_first(are_expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Long enough for any machine: an engine that expects nobody waits for a moment of quiet alone.
    monkeypatch.setattr(engine_module, "_GATHER_SECONDS", 3600.0)
    core = _Core()
    engine = Engine(core, max_waiting=9)
    engine.start()
    try:
        if are_expected:
            with engine.expecting():
                engine.submit(one())
                assert not core.has_stepped.wait(0.05)
                engine.submit(one())
        else:
            engine.submit(one())
        assert core.has_stepped.wait(30)
    finally:
        engine.close()
        engine.join(timeout_seconds=10)
    assert core.num_first == (2 if are_expected else 1)


def test_an_idle_engine_waits_for_a_moment_at_most() -> None:
    core = _Core()
    engine = Engine(core, max_waiting=9)
    engine.start()
    try:
        with engine.expecting():
            engine.submit(one())
            assert core.has_stepped.wait(30)
    finally:
        engine.close()
        engine.join(timeout_seconds=10)
    assert core.num_first == 1


def test_who_follows_at_once_is_run_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    # What comes later than that, on a machine that stands still, is no matter of this test.
    monkeypatch.setattr(engine_module, "_GATHER_SECONDS", 2.0)
    monkeypatch.setattr(engine_module, "_QUIET_SECONDS", 0.5)
    core = _Core()
    engine = Engine(core, max_waiting=9)
    engine.start()
    try:
        for _ in range(3):
            engine.submit(one())
            assert not core.has_stepped.wait(0.01)
        assert core.has_stepped.wait(30)
    finally:
        engine.close()
        engine.join(timeout_seconds=10)
    assert core.num_first == 3
