"""Lease heartbeat: renews a lease from its own thread, and notices a cancel or a requested pause.

Beside it the timer of a process that makes no progress.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from services.jobs import leases, pausing
from services.jobs.leases import Lease, LeaseLostError
from worker.context import WorkerContext

_log = structlog.get_logger()
# A process may be silent for this multiple of its longest silence so far.
_STALL_FACTOR = 5.0


class StallTimer:
    """Measures for how long a process has made no progress; times in seconds of the monotonic clock."""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._longest_silence = 0.0
        self._progress_at = time.monotonic()

    def note_progress(self, came_at: float) -> None:
        """Start again. What the worker has done since the progress came is no silence of the process."""
        self._longest_silence = max(self._longest_silence, came_at - self._progress_at)
        self._progress_at = time.monotonic()

    @property
    def limit_seconds(self) -> float:
        """How long the process may be silent."""
        return max(self._stall_seconds, _STALL_FACTOR * self._longest_silence)

    def is_over(self, now: float) -> bool:
        """Whether it has been silent for longer."""
        return now - self._progress_at > self.limit_seconds


class LeaseHeartbeat:
    """Renews one lease; notices when it is lost (cancelled, taken, ended) or when a pause is requested."""

    def __init__(self, context: WorkerContext, lease: Lease) -> None:
        self._context = context
        self._lease = lease
        self._is_lost = threading.Event()
        self._is_done = threading.Event()
        self._is_pause_asked = threading.Event()
        self.on_lost: Callable[[], None] = lambda: None
        self.on_pause: Callable[[], None] = lambda: None

    def check(self) -> None:
        """Raise LeaseLostError once the lease is lost."""
        if self._is_lost.is_set():
            raise LeaseLostError(f"Attempt {self._lease.fencing_token} no longer holds {self._lease.job_id}.")

    @property
    def is_pause_asked(self) -> bool:
        """Whether the attempt is to stop at its next step, since its job was paused."""
        return self._is_pause_asked.is_set()

    def run(self) -> None:
        """Renew until the work is done or the lease is lost."""
        settings = self._context.settings
        pause_seconds = min(settings.control_seconds, settings.heartbeat_seconds)
        while not self._is_done.wait(pause_seconds):
            try:
                with self._context.database.transaction() as session:
                    status = leases.renew(session, self._lease, settings.lease_seconds)
                if status in pausing.STOPS_ATTEMPT and not self.is_pause_asked:
                    self._is_pause_asked.set()
                    self.on_pause()
            except LeaseLostError:
                self._is_lost.set()
                self.on_lost()
                return
            except Exception as error:  # noqa: BLE001
                # The work continues, and the lease is renewed as soon as the database answers; its expiry
                # decides whose job it is.
                _log.warning("lease not renewed", job_id=self._lease.job_id, error=type(error).__name__)

    def stop(self) -> None:
        self._is_done.set()


@contextmanager
def lease_heartbeat(context: WorkerContext, lease: Lease) -> Iterator[LeaseHeartbeat]:
    heartbeat = LeaseHeartbeat(context, lease)
    thread = threading.Thread(target=heartbeat.run, daemon=True)
    thread.start()
    try:
        yield heartbeat
    finally:
        heartbeat.stop()
        thread.join()
