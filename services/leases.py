"""What a worker does to a job: claim it under a lease, keep the lease, write under its fence, end it.

Every write of an attempt names the lease epoch that its claim got. A worker that was paused, cut off or
declared dead writes nothing any more, because the epoch has moved on. All times are the database's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db.tables import Attempt, Job, Worker
from luthier.core.errors import LuthierError, WorkerCrashedError
from luthier.core.ids import new_id
from luthier.core.states import TERMINAL_STATUSES, JobStatus
from services import deliveries, events
from services.events import NewEvent


class LeaseLostError(LuthierError):
    """The job is no longer this attempt's: cancelled, taken by another worker, or ended."""

    code = "lease_lost"


# Outcome of an attempt that was asked to stop and has not ended yet.
_STOPPING = "stopping"


@dataclass(frozen=True)
class Lease:
    """A claim on a job: the fence of every later write."""

    job_id: str
    epoch: int
    worker_id: str


def beat(session: Session, worker_id: str, *, hostname: str, num_slots: int, facts: dict[str, Any]) -> None:
    """Say that a worker is alive, and what it has."""
    values = {"hostname": hostname, "num_slots": num_slots, "facts": facts, "heartbeat_at": func.now()}
    session.execute(
        insert(Worker)
        .values(id=worker_id, **values)
        .on_conflict_do_update(index_elements=[Worker.id], set_=values)
    )


def list_waiting(session: Session, *, limit: int) -> Sequence[str]:
    """Return ids of jobs that a worker could take now: those to prepare, then the queue; oldest first."""
    return session.scalars(
        select(Job.id)
        .where(
            or_(
                Job.status == JobStatus.QUEUED,
                (Job.status == JobStatus.VALIDATING_FILES)
                & or_(Job.lease_expires_at.is_(None), Job.lease_expires_at < func.now()),
            )
        )
        # Files are checked before anything is trained: a long queue must not hide a broken file.
        .order_by(Job.status == JobStatus.QUEUED, Job.created_at)
        .limit(limit)
    ).all()


def is_at_work(session: Session, worker_id: str) -> bool:
    """Whether a worker holds a job at the moment."""
    held = select(Job.id).where(Job.lease_owner == worker_id, Job.lease_expires_at > func.now()).limit(1)
    return session.scalar(held) is not None


def claim_for_preparing(session: Session, job_id: str, worker_id: str, lease_seconds: float) -> Lease | None:
    """Take a job whose files are to be checked; None when there is nothing (or nobody) to do it for."""
    job = session.scalar(
        select(Job)
        .where(
            Job.id == job_id,
            Job.status == JobStatus.VALIDATING_FILES,
            or_(Job.lease_expires_at.is_(None), Job.lease_expires_at < func.now()),
        )
        .with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    return _take(session, job, worker_id, lease_seconds)


def claim_for_training(
    session: Session, worker_id: str, num_slots: int, lease_seconds: float
) -> tuple[Lease, Job] | None:
    """Take the oldest queued job if the worker has a free slot.

    Args:
        session: the session.
        worker_id: who asks; its row is locked so that two of its processes can't take the same slot.
        num_slots: jobs that it trains at the same time.
        lease_seconds: how long the claim holds without a heartbeat.

    Returns:
        The lease and the job, now `running`; None when there is no job or no slot.
    """
    # The row is there before the first heartbeat too: it is the lock of the worker's slots.
    session.execute(
        insert(Worker)
        .values(id=worker_id, hostname="", num_slots=num_slots, facts={})
        .on_conflict_do_nothing(index_elements=[Worker.id])
    )
    session.execute(select(Worker.id).where(Worker.id == worker_id).with_for_update())
    num_running = session.scalar(
        select(func.count())
        .select_from(Job)
        .where(
            Job.lease_owner == worker_id,
            Job.status.in_([JobStatus.RUNNING, JobStatus.PAUSING]),
            Job.lease_expires_at > func.now(),
        )
    )
    if num_running is not None and num_running >= num_slots:
        return None
    job = session.scalar(
        select(Job)
        .where(Job.status == JobStatus.QUEUED, Job.deleted_at.is_(None))
        .order_by(Job.created_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    is_first = job.started_at is None
    job.status = JobStatus.RUNNING.value
    job.started_at = job.started_at or func.now()
    lease = _take(session, job, worker_id, lease_seconds)
    if is_first:
        events.append(session, job.id, [NewEvent("Fine-tuning job started")])
    session.refresh(job)
    return lease, job


def _take(session: Session, job: Job, worker_id: str, lease_seconds: float) -> Lease:
    job.lease_owner = worker_id
    job.lease_epoch += 1
    job.lease_expires_at = func.now() + timedelta(seconds=lease_seconds)
    session.add(
        Attempt(
            id=new_id("attempt"),
            organization_id=job.organization_id,
            project_id=job.project_id,
            job_id=job.id,
            lease_epoch=job.lease_epoch,
            worker_id=worker_id,
        )
    )
    session.flush()
    return Lease(job.id, job.lease_epoch, worker_id)


def renew(session: Session, lease: Lease, lease_seconds: float) -> None:
    """Keep a lease.

    Args:
        session: the session.
        lease: the claim.
        lease_seconds: how long the claim holds from now on.

    Raises:
        LeaseLostError: when the job is not this attempt's any more.
    """
    update_job(session, lease, lease_expires_at=func.now() + timedelta(seconds=lease_seconds))


def update_job(session: Session, lease: Lease, **values: Any) -> None:
    """Write columns of a job under the fence.

    Args:
        session: the session.
        lease: the claim.
        **values: columns of the job.

    Raises:
        LeaseLostError: when the job is not this attempt's any more; nothing is written.
    """
    written = session.execute(
        update(Job)
        .where(
            Job.id == lease.job_id,
            Job.lease_epoch == lease.epoch,
            Job.lease_owner == lease.worker_id,
            Job.status.not_in(TERMINAL_STATUSES),
        )
        .values(**values)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).one_or_none()
    if written is None:
        raise LeaseLostError(f"Attempt {lease.epoch} no longer holds {lease.job_id}.")


def leave(
    session: Session,
    lease: Lease,
    status: JobStatus,
    *,
    outcome: str,
    event: NewEvent | None = None,
    **values: Any,
) -> None:
    """End an attempt: set the job's next status and give the lease up.

    Args:
        session: the session.
        lease: the claim.
        status: what the job becomes.
        outcome: a word for the attempt's row, such as `succeeded`, `stopped`, `crashed`.
        event: what users are told.
        **values: further columns of the job.

    Raises:
        LeaseLostError: when the job is not this attempt's any more; nothing is written.
    """
    if status.is_terminal:
        values |= {"finished_at": func.now(), "estimated_finish_at": None}
    update_job(session, lease, status=status, lease_owner=None, lease_expires_at=None, **values)
    _end_attempt(session, lease.job_id, lease.epoch, outcome)
    if status.is_terminal:
        deliveries.enqueue(session, lease.job_id, status)
    if event is not None:
        events.append(session, lease.job_id, [event])


def fail(session: Session, lease: Lease, error: LuthierError) -> None:
    """End a job with a reason.

    Args:
        session: the session.
        lease: the claim.
        error: why.

    Raises:
        LeaseLostError: when the job is not this attempt's any more.
    """
    leave(
        session,
        lease,
        JobStatus.FAILED,
        outcome=error.code or "failed",
        event=NewEvent(error.message, level="error", data={"code": error.code, "param": error.param}),
        error={"code": error.code, "message": error.message, "param": error.param},
    )


def retry_or_fail(session: Session, lease: Lease, error: LuthierError, *, max_attempts: int) -> JobStatus:
    """After an attempt that broke off: another one, or the end when it was the last.

    Args:
        session: the session.
        lease: the claim.
        error: what happened; the job's error if it was the last attempt.
        max_attempts: crashes after which a job is failed.

    Returns:
        The job's new status.

    Raises:
        LeaseLostError: when the job is not this attempt's any more.
    """
    job = session.scalar(
        select(Job).where(Job.id == lease.job_id).with_for_update().execution_options(populate_existing=True)
    )
    if job is None or job.lease_epoch != lease.epoch or job.status in TERMINAL_STATUSES:
        raise LeaseLostError(f"Attempt {lease.epoch} no longer holds {lease.job_id}.")
    return _crashed(session, job, error, max_attempts)


def _crashed(session: Session, job: Job, error: LuthierError, max_attempts: int) -> JobStatus:
    outcome = session.scalar(
        select(Attempt.outcome).where(Attempt.job_id == job.id, Attempt.lease_epoch == job.lease_epoch)
    )
    if outcome != _STOPPING:
        job.num_crashes += 1
    _end_attempt(session, job.id, job.lease_epoch, "crashed" if outcome != _STOPPING else "stopped")
    job.lease_owner = None
    job.lease_expires_at = None
    if job.num_crashes >= max_attempts:
        message = (
            f"{error.message} This was attempt {job.num_crashes} of {max_attempts}, so the job has failed."
        )
        job.status = JobStatus.FAILED.value
        job.finished_at = func.now()
        job.estimated_finish_at = None
        job.error = {"code": error.code, "message": message, "param": error.param}
        told = NewEvent(message, level="error", data={"code": error.code})
        deliveries.enqueue(session, job.id, JobStatus.FAILED)
    else:
        goes_on = {JobStatus.RUNNING: JobStatus.QUEUED, JobStatus.PAUSING: JobStatus.PAUSED}
        status = JobStatus(job.status)
        job.status = goes_on.get(status, status).value
        told = NewEvent(f"{error.message} The job goes on from its last save point.", level="warn", data={})
    session.flush()
    events.append(session, job.id, [told])
    return JobStatus(job.status)


def note_start(session: Session, lease: Lease, step: int) -> None:
    """Note the step from which an attempt goes on."""
    _update_attempt(session, lease.job_id, lease.epoch, start_step=step)


def note_stopping(session: Session, lease: Lease) -> None:
    """Note that an attempt was asked to stop: if it does not end in time, that is nobody's crash."""
    _update_attempt(session, lease.job_id, lease.epoch, outcome=_STOPPING)


def end_attempt_of(session: Session, job: Job, outcome: str) -> None:
    """End the attempt that holds a job, if one does: for a job that is ended from outside."""
    if job.lease_owner is not None:
        _end_attempt(session, job.id, job.lease_epoch, outcome)


def _end_attempt(session: Session, job_id: str, epoch: int, outcome: str) -> None:
    step = select(Job.step).where(Job.id == job_id).scalar_subquery()
    _update_attempt(session, job_id, epoch, ended_at=func.now(), outcome=outcome, end_step=step)


def _update_attempt(session: Session, job_id: str, epoch: int, **values: Any) -> None:
    session.execute(
        update(Attempt)
        .where(Attempt.job_id == job_id, Attempt.lease_epoch == epoch)
        .values(**values)
        .execution_options(synchronize_session=False)
    )


def sweep(session: Session, *, max_attempts: int, limit: int = 100) -> Sequence[str]:
    """Take jobs away from workers whose lease has run out.

    Args:
        session: the session.
        max_attempts: crashes after which a job is failed.
        limit: jobs taken at once.

    Returns:
        Ids of the jobs that were taken; two sweepers never take the same one.
    """
    lost = session.scalars(
        select(Job)
        .where(
            Job.status.in_([JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.VALIDATING_FILES]),
            Job.lease_expires_at < func.now(),
        )
        .order_by(Job.lease_expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for job in lost:
        _crashed(session, job, WorkerCrashedError("The worker stopped answering."), max_attempts)
    return [job.id for job in lost]
