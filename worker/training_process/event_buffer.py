"""Event buffer of an attempt: events and columns, written in batches under its fencing token."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.orm import Session

from db.session import Database
from db.tables import Job
from luthier.core.errors import StorageFullError, UnavailableError
from services.jobs import events, leases
from services.jobs.events import NewEvent
from services.jobs.leases import Lease
from worker.heartbeat import LeaseHeartbeat

T = TypeVar("T")

# Two minutes in all: a run of hours is not given up for a restart of storage or database.
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, *[15.0] * 7)


class EventBuffer:
    """Events and columns of one attempt's job until they are written, in batches, in the order they came."""

    def __init__(self, database: Database, lease: Lease, heartbeat: LeaseHeartbeat) -> None:
        self._database = database
        self._lease = lease
        self._heartbeat = heartbeat
        self._events: list[NewEvent] = []
        self._columns: dict[str, Any] = {}

    @property
    def is_empty(self) -> bool:
        return not self._events and not self._columns

    def add(self, message: str, **facts: Any) -> None:
        """Buffer an event; the facts are those of a NewEvent."""
        self._events.append(NewEvent(message, **({"data": {}} | facts)))

    def note(self, **columns: Any) -> None:
        """Buffer columns of the job; a later value of the same column wins."""
        self._columns |= columns

    def flush(self) -> None:
        """Write the buffer; it is kept while the database is unavailable."""
        if self.is_empty:
            return
        try:
            with self._database.transaction() as session:
                self._write_events(session)
        except UnavailableError:
            return
        self._forget()

    def write(self, write: Callable[[Session], T]) -> T:
        """Write the buffer and then `write`, which may run more than once, in one transaction.

        Retried while the database is unavailable, as long as the lease holds.
        """
        return self.with_retries(lambda: self.write_once(write))

    def write_once(self, write: Callable[[Session], T]) -> T:
        """Do as `write` does, without a retry."""
        with self._database.transaction() as session:
            if not self.is_empty:
                self._write_events(session)
            result = write(session)
        self._forget()
        return result

    def with_retries(self, act: Callable[[], T]) -> T:
        """Call `act`, with retries while storage or database is unavailable, as long as the lease holds."""
        for pause_seconds in _PAUSES_SECONDS:
            try:
                return act()
            except (UnavailableError, StorageFullError) as error:
                if not error.retryable:
                    raise
                time.sleep(pause_seconds)
                self._heartbeat.check()
        return act()

    def _write_events(self, session: Session) -> None:
        # The fence is in the update of the row, so there is always one.
        leases.update_job(session, self._lease, **(self._columns or {"step": Job.step}))
        events.append(session, self._lease.job_id, self._events)

    def _forget(self) -> None:
        self._events, self._columns = [], {}
