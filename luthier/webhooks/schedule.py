"""The schedule of retries of a delivery."""

from datetime import datetime, timedelta

_FIRST_PAUSE = timedelta(seconds=5)
_FACTOR = 3
_LONGEST_PAUSE = timedelta(hours=8)
_JITTER = 0.2
KEEP_TRYING = timedelta(hours=72)


def next_try(num_tries: int, *, created_at: datetime, now: datetime, chance: float) -> datetime | None:
    """Return when to try again: after 5 s, and each time three times as long, up to 8 hours.

    Args:
        num_tries: how often it was tried, at least once.
        created_at: when the event happened.
        now: when the last try failed.
        chance: a random number from 0 to 1, so that deliveries that failed together don't return together.

    Returns:
        The moment, or None once the event is 72 hours old by then: it is given up.
    """
    # The exponent is bounded, or the seconds overflow a date.
    pause = min(_FIRST_PAUSE * _FACTOR ** min(num_tries - 1, 20), _LONGEST_PAUSE)
    moment = now + pause * (1 + _JITTER * (2 * chance - 1))
    return moment if moment <= created_at + KEEP_TRYING else None
