"""Prometheus metrics of jobs and workers, read from the database at each scrape. Ages are the database's."""

from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from db.session import Database
from db.tables import Attempt, Job, Worker
from luthier.core.errors import LuthierError
from luthier.core.states import JobStatus

# A worker's heartbeat comes at every sweep, every few seconds.
_ALIVE = timedelta(minutes=1)
# Those of the index over jobs that are still to be worked on.
_UNFINISHED = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSING)
# Their worker holds a lease.
_HELD = (JobStatus.RUNNING, JobStatus.PAUSING)


class DatabaseCollector(Collector):
    """Reads metrics in a transaction; where the database does not answer, reports only that."""

    def __init__(self, database: Database, read: Callable[[Session], Iterable[Metric]]) -> None:
        self._database, self._read = database, read

    def collect(self) -> Iterable[Metric]:
        found: list[Metric] | None = None
        try:
            with self._database.transaction() as session:
                found = list(self._read(session))
        except LuthierError:
            pass
        yield _gauge("database_up", "Whether the database answers.", int(found is not None))
        yield from found or ()

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registration does not query the database."""
        return ()


def read_queue(session: Session, *, lease_seconds: float) -> Iterator[Metric]:
    """Yield the numbers of all jobs that are to be worked on, and of the workers."""
    found = session.execute(
        select(Job.status, func.count()).where(Job.status.in_(_UNFINISHED)).group_by(Job.status)
    ).all()
    num_jobs = {status.value: 0 for status in _UNFINISHED} | {row[0]: row[1] for row in found}
    jobs = GaugeMetricFamily("luthier_jobs", "Jobs that are to be worked on.", labels=["state"])
    for state, number in num_jobs.items():
        jobs.add_metric([state], number)
    yield jobs
    queued_since = session.scalar(
        select(_age(func.min(Job.created_at))).where(Job.status == JobStatus.QUEUED)
    )
    num_workers, slots = session.execute(
        select(func.count(), func.sum(Worker.num_slots)).where(Worker.heartbeat_at > func.now() - _ALIVE)
    ).one()
    num_slots = int(slots or 0)
    num_free = max(0, num_slots - sum(num_jobs[status] for status in _HELD))
    lease_age = session.scalar(_oldest_lease(lease_seconds))
    yield _gauge("queue_wait_seconds", "Age of the oldest queued job.", queued_since)
    yield _gauge("lease_age_seconds", "Since the oldest lease was renewed.", lease_age)
    yield _gauge("workers", "Workers that live.", num_workers)
    yield _gauge("training_slots", "Jobs that they train at the same time.", num_slots)
    yield _gauge("training_slots_free", "Slots without a job.", num_free)


def read_worker(
    session: Session, worker_id: str, *, num_slots: int, lease_seconds: float
) -> Iterator[Metric]:
    """Yield the numbers of one worker: jobs that it holds, and how its attempts have ended."""
    is_held = (Job.lease_owner == worker_id) & Job.status.in_(_HELD)
    num_running = session.scalar(select(func.count()).where(is_held)) or 0
    lease_age = session.scalar(_oldest_lease(lease_seconds).where(is_held))
    yield _gauge("worker_slots", "Jobs that this worker trains at the same time.", num_slots)
    yield _gauge("worker_slots_free", "Slots without a job.", num_slots - num_running)
    yield _gauge("worker_lease_age_seconds", "Since its oldest lease was renewed.", lease_age)
    attempts = CounterMetricFamily(
        "luthier_worker_attempts", "Attempts of this worker that ended.", labels=["outcome"]
    )
    outcomes = session.execute(
        select(Attempt.outcome, func.count())
        .where(Attempt.worker_id == worker_id, Attempt.outcome.is_not(None))
        .group_by(Attempt.outcome)
    )
    for outcome, number in outcomes:
        attempts.add_metric([str(outcome)], number)
    yield attempts


def _gauge(name: str, meaning: str, value: Any) -> Metric:
    """Return a gauge; None, where there is nothing of its kind, counts as 0."""
    return GaugeMetricFamily(f"luthier_{name}", meaning, value=float(value or 0))


def _age(moment: Any) -> ColumnElement[Any]:
    return func.extract("epoch", func.now() - moment)


def _oldest_lease(lease_seconds: float) -> Any:
    renewed_at = func.min(Job.lease_expires_at) - timedelta(seconds=lease_seconds)
    return select(func.greatest(_age(renewed_at), 0)).where(
        Job.status.in_(_HELD), Job.lease_expires_at.is_not(None)
    )
