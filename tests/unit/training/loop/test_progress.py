"""Pace and time left, on a clock of our own."""

import pytest

from luthier.training.loop.run_stats import Pace


def test_pace_counts_the_last_steps_only_and_the_time_left_follows() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0], 10_000)
    now[0] = 10.0
    pace.step_done(100)
    assert pace.tokens_per_second == pytest.approx(10)
    for _ in range(30):
        now[0] += 1.0
        pace.step_done(200)
    assert pace.tokens_per_second == pytest.approx(200)
    assert pace.seconds_left == pytest.approx((10_000 - 6_100) / 200)
