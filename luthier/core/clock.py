"""The wall clock, in one place so that a test can pass another."""

import time


def now_seconds() -> int:
    """Return the current time as whole Unix seconds, the unit of every timestamp on the wire."""
    return int(time.time())
