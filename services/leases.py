"""What a worker does to a job: claim it under a lease, keep the lease, write under its fence, end it.

Every write of an attempt names the lease epoch that its claim got. A worker that was paused, cut off or
declared dead writes nothing any more, because the epoch has moved on. All times are the database's.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db.tables import Job, Worker
from luthier.core.devices import Device
from luthier.core.errors import LuthierError, WorkerCrashedError
from luthier.core.states import TERMINAL_STATUSES, JobStatus
from services import attempts, deliveries, events, memory
from services.events import NewEvent
from services.turns import by_turns


class LeaseLostError(LuthierError):
    """The job is no longer this attempt's: cancelled, taken by another worker, or ended."""

    code = "lease_lost"


# What a job waits as when its attempt ends before it does: one that is being paused is paused.
WAITS_AS = {
    JobStatus.VALIDATING_FILES: JobStatus.VALIDATING_FILES,
    JobStatus.RUNNING: JobStatus.QUEUED,
    JobStatus.PAUSING: JobStatus.PAUSED,
    # Resumed while its attempt was stopping: queued already, and still held.
    JobStatus.QUEUED: JobStatus.QUEUED,
}


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


def list_unchecked(session: Session, *, limit: int) -> Sequence[str]:
    """Return ids of jobs whose files nobody checks yet, projects in turn."""
    unchecked = select(Job.id).where(_is_unchecked())
    return session.scalars(unchecked.order_by(*by_turns("prepare")).limit(limit)).all()


def is_work_waiting(session: Session) -> bool:
    """Whether a job waits for a worker, to have its files checked or to be trained."""
    waiting = select(Job.id).where(or_(_is_unchecked(), memory.is_queued())).limit(1)
    return session.scalar(waiting) is not None


def _is_unchecked() -> ColumnElement[bool]:
    return (Job.status == JobStatus.VALIDATING_FILES) & or_(
        Job.lease_expires_at.is_(None), Job.lease_expires_at < func.now()
    )


def list_held(session: Session, job_ids: Collection[str]) -> set[tuple[str, int]]:
    """Return which of some jobs an attempt holds, each with the number of its claim."""
    held = select(Job.id, Job.lease_epoch).where(Job.id.in_(job_ids), Job.lease_owner.is_not(None))
    return {(job_id, epoch) for job_id, epoch in session.execute(held)}


def is_at_work(session: Session, worker_id: str) -> bool:
    """Whether a worker holds a job at the moment."""
    held = select(Job.id).where(Job.lease_owner == worker_id, Job.lease_expires_at > func.now()).limit(1)
    return session.scalar(held) is not None


def claim_for_preparing(session: Session, job_id: str, worker_id: str, lease_seconds: float) -> Lease | None:
    """Take a job whose files are to be checked; None when there is nothing (or nobody) to do it for."""
    job = session.scalar(
        select(Job).where(Job.id == job_id, _is_unchecked()).with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    if job.lease_owner is not None:
        attempts.end(session, job.id, job.lease_epoch, "crashed")
    return _take(session, job, worker_id, lease_seconds)


def claim_for_training(
    session: Session,
    worker_id: str,
    num_slots: int,
    lease_seconds: float,
    *,
    device: Device | None = None,
    tells: bool = True,
) -> tuple[Lease, Job] | None:
    """Take the oldest queued job if the worker has a free slot and the job's memory can be had.

    Args:
        worker_id: who asks; its row is locked so that two of its processes can't take the same slot.
        device: where the job would run; None where its memory is not known, so that nobody counts it.
        tells: whether jobs that must wait for memory are told so.

    Returns:
        The lease and the job, now `running`; None when there is no job, no slot or no memory.
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
            # A queued one with a lease was resumed while its attempt was stopping.
            Job.status.in_([JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.QUEUED]),
            Job.lease_expires_at > func.now(),
        )
    )
    if num_running is not None and num_running >= num_slots:
        return None
    if device is None:
        job, num_bytes = memory.find_oldest(session), 0
    else:
        chosen = memory.choose(session, device, lease_seconds=lease_seconds, tells=tells)
        job, num_bytes = chosen or (None, 0)
    if job is None:
        return None
    is_first = job.started_at is None
    job.status = JobStatus.RUNNING.value
    job.started_at = job.started_at or func.now()
    lease = _take(session, job, worker_id, lease_seconds)
    if device is not None:
        memory.grant(session, device, job, num_bytes, lease_seconds)
    if is_first:
        events.append(session, job.id, [NewEvent("Fine-tuning job started")])
    session.refresh(job)
    return lease, job


def _take(session: Session, job: Job, worker_id: str, lease_seconds: float) -> Lease:
    job.lease_owner = worker_id
    job.lease_epoch += 1
    job.lease_expires_at = func.now() + timedelta(seconds=lease_seconds)
    session.flush()
    attempts.record(session, job, worker_id)
    return Lease(job.id, job.lease_epoch, worker_id)


def renew(session: Session, lease: Lease, lease_seconds: float) -> JobStatus:
    """Keep a lease, and what the ledger of memory gave under it.

    Returns:
        The job's status, by which its attempt learns that it is to be paused.

    Raises:
        LeaseLostError: when the job is not this attempt's any more.
    """
    status = update_job(session, lease, lease_expires_at=func.now() + timedelta(seconds=lease_seconds))
    memory.renew(session, lease.job_id, lease.epoch, lease_seconds)
    return status


def update_job(session: Session, lease: Lease, **values: Any) -> JobStatus:
    """Write columns of a job under the fence.

    Returns:
        The job's status after it.

    Raises:
        LeaseLostError: when the job is not this attempt's any more; nothing is written.
    """
    status = session.scalar(
        update(Job)
        .where(
            Job.id == lease.job_id,
            Job.lease_epoch == lease.epoch,
            Job.lease_owner == lease.worker_id,
            Job.status.not_in(TERMINAL_STATUSES),
        )
        .values(**values)
        .returning(Job.status)
        .execution_options(synchronize_session=False)
    )
    if status is None:
        raise _lost(lease)
    return JobStatus(status)


def _lost(lease: Lease) -> LeaseLostError:
    return LeaseLostError(f"Attempt {lease.epoch} no longer holds {lease.job_id}.")


def hold(session: Session, lease: Lease) -> Job:
    """Return an attempt's job, as it is now and locked until the transaction ends.

    Raises:
        LeaseLostError: when the job is not this attempt's any more.
    """
    job = session.scalar(
        select(Job).where(Job.id == lease.job_id).with_for_update().execution_options(populate_existing=True)
    )
    if job is None or (job.lease_epoch, job.lease_owner) != (lease.epoch, lease.worker_id):
        raise _lost(lease)
    if job.status in TERMINAL_STATUSES:
        raise _lost(lease)
    return job


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
        outcome: a word for the attempt's row, such as `succeeded`, `stopped`, `crashed`.

    Raises:
        LeaseLostError: when the job is not this attempt's any more; nothing is written.
    """
    if status.is_terminal:
        values |= {"finished_at": func.now()}
        if hold(session, lease).status == JobStatus.QUEUED:
            # Resumed while this attempt was stopping, which has come to the end after all.
            update_job(session, lease, status=JobStatus.RUNNING)
    values |= {"lease_owner": None, "lease_expires_at": None, "estimated_finish_at": None}
    update_job(session, lease, status=status, **values)
    attempts.end(session, lease.job_id, lease.epoch, outcome)
    if status.is_terminal:
        deliveries.enqueue(session, lease.job_id, status)
    if event is not None:
        events.append(session, lease.job_id, [event])


def wait_again(session: Session, lease: Lease, *, outcome: str, event: NewEvent) -> JobStatus:
    """End an attempt before its job's end: the job waits for another, or is paused if that was asked for.

    Returns:
        What the job is now.

    Raises:
        LeaseLostError: when the job is not this attempt's any more; nothing is written.
    """
    status = WAITS_AS[JobStatus(hold(session, lease).status)]
    leave(session, lease, status, outcome=outcome, event=event)
    return status


def fail(session: Session, lease: Lease, error: LuthierError) -> None:
    """End a job with a reason.

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
        error: what happened; the job's error if it was the last attempt.

    Raises:
        LeaseLostError: when the job is not this attempt's any more.
    """
    return _crashed(session, hold(session, lease), error, max_attempts)


def _crashed(session: Session, job: Job, error: LuthierError, max_attempts: int) -> JobStatus:
    # What was asked to stop, by its worker or by a pause, and did not get to it is nobody's crash.
    is_stopping = attempts.is_stopping(session, job) or job.status in (JobStatus.PAUSING, JobStatus.QUEUED)
    if not is_stopping:
        job.num_crashes += 1
    attempts.end(session, job.id, job.lease_epoch, "stopped" if is_stopping else "crashed")
    job.lease_owner = job.lease_expires_at = job.estimated_finish_at = None
    if not is_stopping and job.num_crashes >= max_attempts:
        message = (
            f"{error.message} This was attempt {job.num_crashes} of {max_attempts}, so the job has failed."
        )
        job.status = JobStatus.FAILED.value
        job.finished_at = func.now()
        job.error = {"code": error.code, "message": message, "param": error.param}
        told = NewEvent(message, level="error", data={"code": error.code})
        deliveries.enqueue(session, job.id, JobStatus.FAILED)
    else:
        job.status = WAITS_AS[JobStatus(job.status)].value
        goes_on = "is paused at" if job.status == JobStatus.PAUSED else "goes on from"
        where = "its last save point" if job.save_points else "its beginning"
        told = NewEvent(
            f"{error.message} The job {goes_on} {where}.", level="warn", data={"code": error.code}
        )
    session.flush()
    events.append(session, job.id, [told])
    return JobStatus(job.status)


def sweep(session: Session, *, max_attempts: int, limit: int = 100) -> Sequence[str]:
    """Take jobs away from workers whose lease has run out.

    Returns:
        Ids of the jobs that were taken; two sweepers never take the same one.
    """
    lost = session.scalars(
        select(Job)
        .where(
            Job.status.in_(list(WAITS_AS)),
            Job.lease_expires_at < func.now(),
        )
        .order_by(Job.lease_expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for job in lost:
        _crashed(session, job, WorkerCrashedError("The worker stopped answering."), max_attempts)
    return [job.id for job in lost]
