"""Sums over attempts, pace and time left, on a clock that only the test moves."""

import pytest

from luthier.core.events import PhaseSeconds
from luthier.training.loop.run_stats import Pace, Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sums_continue_from_those_of_the_attempt_before():
    clock = Clock()
    counts = {"tokens_seen": 100, "supervised_tokens_seen": 40, "peak_memory_bytes": 2**60}
    stats = Progress(seconds=PhaseSeconds(load=1.0, train=10.0), **counts)
    stats.add_seconds("load", 2.0)
    with stats.phase("train", clock):
        clock.now = 5.0
    stats.tokens_seen += 50
    stats.supervised_tokens_seen += 20
    stats.note_memory("cpu")
    assert stats.seconds == PhaseSeconds(load=3.0, train=15.0)
    assert (stats.tokens_seen, stats.supervised_tokens_seen) == (150, 60)
    assert stats.tokens_per_second == 10.0
    assert stats.peak_memory_bytes == 2**60


def test_the_time_of_what_failed_counts_too():
    clock = Clock()
    stats = Progress()
    with pytest.raises(ValueError, match="no"), stats.phase("evaluate", clock):
        clock.now = 3.0
        raise ValueError("no")
    assert stats.seconds == PhaseSeconds(evaluate=3.0)
    assert stats.tokens_per_second is None


def test_pace_counts_the_last_steps_only_and_the_time_left_follows():
    clock = Clock()
    pace = Pace(clock, 10_000)
    clock.now = 10.0
    pace.step_done(100)
    assert pace.tokens_per_second == pytest.approx(10)
    for _ in range(30):
        clock.now += 1.0
        pace.step_done(200)
    assert pace.tokens_per_second == pytest.approx(200)
    assert pace.seconds_left == pytest.approx((10_000 - 6_100) / 200)
