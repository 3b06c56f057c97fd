"""When a delivery that failed is tried again, by a clock that the test winds."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from luthier.webhooks.schedule import next_try

_BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def _tries(chance: float) -> list[datetime]:
    """Return the moments of all tries of a delivery that always fails at once."""
    tries = [_BEGAN]
    while (moment := next_try(len(tries), created_at=_BEGAN, now=tries[-1], chance=chance)) is not None:
        tries.append(moment)
    return tries


def test_pauses_grow_threefold_from_five_seconds_to_eight_hours():
    tries = _tries(0.5)
    pauses = [(after - before).total_seconds() for before, after in pairwise(tries)]
    assert pauses[:4] == [5, 15, 45, 135]
    assert pauses[-1] == 8 * 3600
    assert pauses == sorted(pauses)


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_it_is_tried_for_three_days_and_then_given_up(chance):
    tries = _tries(chance)
    assert _BEGAN + timedelta(hours=62) < tries[-1] <= _BEGAN + timedelta(hours=72)
    assert 15 <= len(tries) <= 22


@pytest.mark.parametrize(
    ("num_tries", "late", "chance", "pause"),
    [
        # Deliveries that failed together are tried again at different times.
        (3, timedelta(0), 0.0, timedelta(seconds=36)),
        (3, timedelta(0), 1.0, timedelta(seconds=54)),
        # A count beyond reason is no overflow, and an old event that is found late is given up after its try.
        (10**6, timedelta(0), 0.5, timedelta(hours=8)),
        (1, timedelta(hours=73), 0.5, None),
    ],
)
def test_the_next_try_is_at_a_time_of_its_own(num_tries, late, chance, pause):
    moment = next_try(num_tries, created_at=_BEGAN, now=_BEGAN + late, chance=chance)
    assert moment == (None if pause is None else _BEGAN + pause)
