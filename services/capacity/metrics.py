"""Numbers of jobs and workers, as the metrics of API and workers report them. Ages are the database's."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from db.tables import Attempt, Job, Worker
from luthier.core.states import JobStatus

# A worker's heartbeat comes at every sweep, every few seconds.
_ALIVE = timedelta(minutes=1)
# Those of the index over jobs that are still to be worked on.
_UNFINISHED = (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.PAUSING)
# Their worker holds a lease.
_HELD = (JobStatus.RUNNING, JobStatus.PAUSING)


@dataclass(frozen=True)
class QueueNumbers:
    """All jobs and workers at one moment; an age is 0 where there is nothing of its kind."""

    num_jobs: dict[str, int]
    oldest_queued_seconds: float
    oldest_lease_seconds: float
    num_workers: int
    num_slots: int

    @property
    def num_free_slots(self) -> int:
        """Slots of living workers in which no job runs."""
        return max(0, self.num_slots - sum(self.num_jobs[status] for status in _HELD))


@dataclass(frozen=True)
class WorkerNumbers:
    """One worker's jobs at one moment."""

    num_running: int
    oldest_lease_seconds: float
    num_attempts: dict[str, int]


def read_queue(session: Session, *, lease_seconds: float) -> QueueNumbers:
    """Read the numbers of all jobs that are to be worked on, and of the workers."""
    found = session.execute(
        select(Job.status, func.count()).where(Job.status.in_(_UNFINISHED)).group_by(Job.status)
    ).all()
    num_jobs = {status.value: 0 for status in _UNFINISHED} | {row[0]: row[1] for row in found}
    queued_since = session.scalar(
        select(_age(func.min(Job.created_at))).where(Job.status == JobStatus.QUEUED)
    )
    workers = session.execute(
        select(func.count(), func.sum(Worker.num_slots)).where(Worker.heartbeat_at > func.now() - _ALIVE)
    ).one()
    lease_age = session.scalar(_oldest_lease(lease_seconds))
    return QueueNumbers(
        num_jobs=num_jobs,
        oldest_queued_seconds=float(queued_since or 0),
        oldest_lease_seconds=float(lease_age or 0),
        num_workers=workers[0],
        num_slots=int(workers[1] or 0),
    )


def read_worker(session: Session, worker_id: str, *, lease_seconds: float) -> WorkerNumbers:
    """Read the numbers of one worker: jobs that it holds, and how its attempts have ended."""
    is_held = (Job.lease_owner == worker_id) & Job.status.in_(_HELD)
    running = session.scalar(select(func.count()).where(is_held))
    lease_age = session.scalar(_oldest_lease(lease_seconds).where(is_held))
    outcomes = session.execute(
        select(Attempt.outcome, func.count())
        .where(Attempt.worker_id == worker_id, Attempt.outcome.is_not(None))
        .group_by(Attempt.outcome)
    )
    return WorkerNumbers(
        running or 0, float(lease_age or 0), {str(outcome): number for outcome, number in outcomes}
    )


def _age(moment: Any) -> ColumnElement[Any]:
    return func.extract("epoch", func.now() - moment)


def _oldest_lease(lease_seconds: float) -> Any:
    renewed_at = func.min(Job.lease_expires_at) - timedelta(seconds=lease_seconds)
    return select(func.greatest(_age(renewed_at), 0)).where(
        Job.status.in_(_HELD), Job.lease_expires_at.is_not(None)
    )
