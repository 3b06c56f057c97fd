"""Attempts: one row per claim of a job, with its first and last step and its outcome."""

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db.tables import Attempt, Job
from luthier.core.ids import new_id
from luthier.core.states import JobStatus

# Outcome of an attempt that was asked to stop and has not ended yet.
STOPPING = "stopping"


def record(session: Session, job: Job, worker_id: str) -> None:
    """Record that a worker has claimed a job, under the fencing token of the job's row."""
    session.add(
        Attempt(
            id=new_id("attempt"),
            organization_id=job.organization_id,
            project_id=job.project_id,
            job_id=job.id,
            lease_epoch=job.lease_epoch,
            worker_id=worker_id,
            stage="prepare" if job.status == JobStatus.VALIDATING_FILES else "train",
        )
    )


def note_start(session: Session, job_id: str, fencing_token: int, step: int) -> None:
    """Record the step from which an attempt starts."""
    _update(session, job_id, fencing_token, start_step=step)


def note_stopping(session: Session, job_id: str, fencing_token: int) -> None:
    """Record that an attempt was asked to stop, so that a late end does not count as a crash."""
    _update(session, job_id, fencing_token, outcome=STOPPING)


def is_stopping(session: Session, job: Job) -> bool:
    """Whether the job's newest attempt was asked to stop."""
    outcome = select(Attempt.outcome).where(Attempt.job_id == job.id, Attempt.lease_epoch == job.lease_epoch)
    return session.scalar(outcome) == STOPPING


def end(session: Session, job_id: str, fencing_token: int, outcome: str) -> None:
    """End an attempt, at the step that its job has reached."""
    step = select(Job.step).where(Job.id == job_id).scalar_subquery()
    _update(session, job_id, fencing_token, ended_at=func.now(), outcome=outcome, end_step=step)


def _update(session: Session, job_id: str, fencing_token: int, **values: Any) -> None:
    session.execute(
        update(Attempt).where(Attempt.job_id == job_id, Attempt.lease_epoch == fencing_token).values(**values)
    )
