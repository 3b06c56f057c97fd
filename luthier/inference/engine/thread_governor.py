"""Lowers the number of threads of a step while other processes use the same processors.

The threads of a step meet many times in it. As long as each has a processor of its own that costs nothing;
where one of them has to wait for its turn, all others wait with it, at every meeting, and a step takes a
hundred times as long. Fewer threads lose less. Linux counts how long a thread waited for a processor
(Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat).
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

_TASKS = Path("/proc/self/task")
_NANOSECONDS = 1e-9
# Steps are judged together for so long, in seconds: some turns of a scheduler.
_WINDOW_SECONDS = 0.2
# Shares of its time that a thread has waited: above the first fewer threads do more, below the second there
# is room for more of them.
_CROWDED, _ROOMY = 0.35, 0.15
# Fewer threads stay for so long, in seconds; longer each time that more of them failed at once.
_SHORTEST_STAY, _LONGEST_STAY = 1.0, 16.0


class Waited(NamedTuple):
    """Seconds that a thread has run, and waited for a processor."""

    ran: float
    waited: float


def read_waits() -> dict[str, Waited]:
    """Return the seconds that each thread ran and waited; empty where there is no account."""
    found: dict[str, Waited] = {}
    try:
        tasks = list(_TASKS.iterdir())
    except OSError:
        return found
    for task in tasks:
        try:
            ran, waited, _ = (task / "schedstat").read_text().split()
        except (OSError, ValueError):
            # It has ended, or the system keeps no such account.
            continue
        found[task.name] = Waited(int(ran) * _NANOSECONDS, int(waited) * _NANOSECONDS)
    return found


class ThreadGovernor:
    """Chooses the number of threads of the next steps: halved down to 1, and doubled again.

    Args:
        now: a clock, in seconds.
    """

    def __init__(
        self,
        num_threads: int,
        read: Callable[[], Mapping[str, Waited]] = read_waits,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self.num_threads = num_threads, num_threads
        self._read, self._now = read, now
        self._busy_seconds = 0.0
        self._before = read() if num_threads > 1 else {}
        self._stay = _SHORTEST_STAY
        self._changed_at = -_LONGEST_STAY

    def note(self, seconds: float) -> None:
        """Take account of a step; `num_threads` is for the next one."""
        if self._most == 1:
            return
        self._busy_seconds += seconds
        if self._busy_seconds < _WINDOW_SECONDS:
            return
        after = self._read()
        share = _waiting_share(self._before, after, self._busy_seconds)
        self._before, self._busy_seconds = after, 0.0
        now = self._now()
        since = now - self._changed_at
        if share > _CROWDED and self.num_threads > 1:
            # More threads that failed at once are tried again later.
            self._stay = min(2 * self._stay, _LONGEST_STAY) if since < self._stay else _SHORTEST_STAY
            self._change(self.num_threads // 2, now)
        elif share < _ROOMY and self.num_threads < self._most and since >= self._stay:
            self._change(min(2 * self.num_threads, self._most), now)

    def _change(self, num_threads: int, now: float) -> None:
        self.num_threads, self._changed_at = num_threads, now


def _waiting_share(before: Mapping[str, Waited], after: Mapping[str, Waited], busy_seconds: float) -> float:
    """Return the largest share that a thread waited of those that were at work for most of the time."""
    share = 0.0
    for name, now in after.items():
        then = before.get(name, now)
        ran, waited = now.ran - then.ran, now.waited - then.waited
        if ran + waited > busy_seconds / 2:
            share = max(share, waited / (ran + waited))
    return share
