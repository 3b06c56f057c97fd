"""What an attempt has to say, gathered and written under its fence; and patience with what is away."""

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
        self._news: list[NewEvent] = []
        self._columns: dict[str, Any] = {}

    @property
    def is_empty(self) -> bool:
        """Whether all is written."""
        return not self._news and not self._columns

    def tell(self, message: str, **facts: Any) -> None:
        """Gather an event; the facts are those of a NewEvent."""
        self._news.append(NewEvent(message, **({"data": {}} | facts)))

    def note(self, **columns: Any) -> None:
        """Gather columns of the job; a later value of the same column wins."""
        self._columns |= columns

    def flush(self) -> None:
        """Write what is gathered; it is kept, for another time, while the database is away."""
        if self.is_empty:
            return
        try:
            with self._database.transaction() as session:
                self._write_news(session)
        except UnavailableError:
            return
        self._forget()

    def write(self, write: Callable[[Session], T]) -> T:
        """Write what is gathered and then something more, in one transaction.

        That is tried again after a pause while the database is away, as long as the lease holds.

        Args:
            write: what more; it may run more than once.
        """
        return self.patiently(lambda: self.write_once(write))

    def write_once(self, write: Callable[[Session], T]) -> T:
        """Do as `write` does, but leave it at one try."""
        with self._database.transaction() as session:
            if not self.is_empty:
                self._write_news(session)
            result = write(session)
        self._forget()
        return result

    def patiently(self, act: Callable[[], T]) -> T:
        """Do something, again after a pause while what it needs is away, as long as the lease holds."""
        for pause_seconds in _PAUSES_SECONDS:
            try:
                return act()
            except (UnavailableError, StorageFullError) as error:
                if not error.retryable:
                    raise
                time.sleep(pause_seconds)
                self._heartbeat.check()
        return act()

    def _write_news(self, session: Session) -> None:
        # The fence is in the update of the row, so there is always one.
        leases.update_job(session, self._lease, **(self._columns or {"step": Job.step}))
        events.append(session, self._lease.job_id, self._news)

    def _forget(self) -> None:
        self._news, self._columns = [], {}
