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


def test_pauses_grow_threefold_from_five_seconds_to_eight_hours() -> None:
    tries = _tries(0.5)
    pauses = [(after - before).total_seconds() for before, after in pairwise(tries)]
    assert pauses[:4] == [5, 15, 45, 135]
    assert pauses[-1] == 8 * 3600
    assert pauses == sorted(pauses)


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_it_is_tried_for_three_days_and_then_given_up(chance: float) -> None:
    tries = _tries(chance)
    assert _BEGAN + timedelta(hours=62) < tries[-1] <= _BEGAN + timedelta(hours=72)
    assert 15 <= len(tries) <= 22


def test_deliveries_that_failed_together_are_retried_at_different_times() -> None:
    early = next_try(3, created_at=_BEGAN, now=_BEGAN, chance=0)
    late = next_try(3, created_at=_BEGAN, now=_BEGAN, chance=1)
    assert early is not None
    assert late is not None
    assert (early - _BEGAN, late - _BEGAN) == (timedelta(seconds=36), timedelta(seconds=54))


def test_a_count_beyond_reason_is_no_overflow() -> None:
    assert next_try(10**6, created_at=_BEGAN, now=_BEGAN, chance=0.5) == _BEGAN + timedelta(hours=8)


def test_an_old_event_that_is_found_late_is_given_up_after_its_try() -> None:
    now = _BEGAN + timedelta(hours=73)
    assert next_try(1, created_at=_BEGAN, now=now, chance=0.5) is None
