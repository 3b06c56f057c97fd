"""Leases: a worker claims a job, renews its lease, writes under the fencing token and ends the attempt.

Every write of an attempt names the token of its claim (column `lease_epoch`). A function that takes a
`Lease` raises `LeaseLostError`, and writes nothing, when another claim, a cancel or an end came in between.
All times are the database's.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, true, update
from sqlalchemy.orm import Session

from db.tables import Job
from luthier.core.devices import Device
from luthier.core.errors import LuthierError, UnavailableError, WorkerCrashedError
from luthier.core.states import TERMINAL_STATUSES, JobStatus
from services.capacity import memory, workers
from services.jobs import attempts, events
from services.jobs.events import NewEvent
from services.jobs.queue_order import by_turns
from services.webhooks import deliveries


class LeaseLostError(LuthierError):
    """The job is no longer this attempt's: cancelled, taken by another worker, or ended."""

    code = "lease_lost"


# Columns of a job after progress: a newer save point, or files that were checked.
PROGRESS: dict[str, Any] = {
    "num_crashes": 0,
    "num_losses": 0,
    "num_faults": 0,
    "fault_code": None,
    "avoided_workers": [],
    "waits_for": None,
}
# Workers that stopped answering, without a newer save point in between, after which a job is failed.
_MAX_LOSSES = 10
# Tries in a row at what refuses, after which a job is failed.
_MAX_FAULTS = 8
_MAX_PAUSE_SECONDS = 300.0
_LOSS_PAUSE_SECONDS = 5.0
_ANY = true()


# The status of a job whose attempt ends before it does.
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
    fencing_token: int
    worker_id: str


def list_unchecked(
    session: Session, worker_id: str, *, limit: int, can_run: ColumnElement[bool]
) -> Sequence[str]:
    """Return ids of jobs whose files wait for a check that the worker may make, projects in turn."""
    fitting = select(Job.id).where(_is_unchecked(), workers.may_take(worker_id), can_run)
    return session.scalars(fitting.order_by(*by_turns("prepare")).limit(limit)).all()


def _is_unchecked() -> ColumnElement[bool]:
    # The sweep takes one whose lease has expired.
    return (Job.status == JobStatus.VALIDATING_FILES) & Job.lease_owner.is_(None) & memory.is_due()


def list_held(session: Session, job_ids: Collection[str]) -> set[tuple[str, int]]:
    """Return which of some jobs an attempt holds, each with the number of its claim."""
    # The attempt of one that was cancelled ends with its lease at the latest.
    is_held = or_(Job.status.not_in(TERMINAL_STATUSES), Job.lease_expires_at > func.now())
    held = select(Job.id, Job.lease_epoch).where(Job.id.in_(job_ids), Job.lease_owner.is_not(None), is_held)
    return {(job_id, token) for job_id, token in session.execute(held)}


def claim_for_preparing(session: Session, job_id: str, worker_id: str, lease_seconds: float) -> Lease | None:
    """Claim a job whose files wait for a check; None when it does not wait any more."""
    job = session.scalar(
        select(Job).where(Job.id == job_id, _is_unchecked()).with_for_update(skip_locked=True)
    )
    if job is None:
        return None
    return _take(session, job, worker_id, lease_seconds)


def claim_for_training(
    session: Session,
    worker_id: str,
    num_slots: int,
    lease_seconds: float,
    *,
    device: Device | None = None,
    lent: tuple[str, int] = ("", 0),
    is_final: bool = True,
    on_wait: Callable[[memory.Waiting], None] = lambda _: None,
    can_run: ColumnElement[bool] = _ANY,
) -> tuple[Lease, Job] | None:
    """Claim the next queued job, or None without a job, a free slot or free memory; it is then `running`."""
    worker = workers.lock(session, worker_id)
    if worker.quarantine_reason is not None:
        return None
    num_running = session.scalar(
        select(func.count())
        .select_from(Job)
        .where(
            # A job whose lease has run out is its worker's until the sweep takes it: the database may have
            # been away, and its process trains on.
            Job.lease_owner == worker_id,
            # A queued one with a lease was resumed while its attempt was stopping.
            Job.status.in_([JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.QUEUED]),
        )
    )
    if num_running is not None and num_running >= num_slots:
        return None
    fits = workers.may_take(worker_id) & can_run
    chosen = memory.choose(session, device, fits=fits, lent=lent, is_final=is_final, on_wait=on_wait)
    if chosen is None:
        return None
    job, num_bytes = chosen
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
    """Renew a lease and the memory granted under it; return the job's status."""
    status = update_job(session, lease, lease_expires_at=func.now() + timedelta(seconds=lease_seconds))
    memory.renew(session, lease.job_id, lease.fencing_token, lease_seconds)
    return status


def update_job(session: Session, lease: Lease, **values: Any) -> JobStatus:
    """Write columns of a job under the fencing token; return its status."""
    status = session.scalar(
        update(Job)
        .where(
            Job.id == lease.job_id,
            Job.lease_epoch == lease.fencing_token,
            Job.lease_owner == lease.worker_id,
            Job.status.not_in(TERMINAL_STATUSES),
        )
        .values(**values)
        .returning(Job.status)
    )
    if status is None:
        raise _lost(lease)
    return JobStatus(status)


def _lost(lease: Lease) -> LeaseLostError:
    return LeaseLostError(f"Attempt {lease.fencing_token} no longer holds {lease.job_id}.")


def hold(session: Session, lease: Lease) -> Job:
    """Return an attempt's job, as it is now and locked until the transaction ends."""
    job = session.scalar(
        select(Job).where(Job.id == lease.job_id).with_for_update().execution_options(populate_existing=True)
    )
    if (
        job is None
        or (job.lease_epoch, job.lease_owner) != (lease.fencing_token, lease.worker_id)
        or job.status in TERMINAL_STATUSES
    ):
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
    """End an attempt: set the job's next status and give the lease up."""
    _end(session, hold(session, lease), status, outcome=outcome, event=event, **values)


def _end(
    session: Session, job: Job, status: JobStatus, *, outcome: str, event: NewEvent | None, **values: Any
) -> JobStatus:
    """End the newest attempt of a locked job."""
    if status.is_terminal:
        values |= {"finished_at": func.now()}
        if job.status == JobStatus.QUEUED:
            # Resumed while this attempt was stopping, which has come to the end after all.
            job.status = JobStatus.RUNNING.value
            session.flush()
    values |= {"status": status.value, "lease_owner": None, "lease_expires_at": None}
    for name, value in (values | {"estimated_finish_at": None}).items():
        setattr(job, name, value)
    session.flush()
    attempts.end(session, job.id, job.lease_epoch, outcome)
    if status.is_terminal:
        deliveries.enqueue(session, job.id, status)
    if event is not None:
        events.append(session, job.id, [event])
    return status


def wait_again(session: Session, lease: Lease, *, outcome: str, event: NewEvent | None) -> JobStatus:
    """End an attempt before its job's end: the job waits for another, or is paused if that was asked for."""
    job = hold(session, lease)
    return _end(session, job, WAITS_AS[JobStatus(job.status)], outcome=outcome, event=event)


def fail(session: Session, lease: Lease, error: LuthierError) -> None:
    leave(
        session,
        lease,
        JobStatus.FAILED,
        outcome=error.code or "failed",
        event=NewEvent(error.message, level="error", data={"code": error.code, "param": error.param}),
        error={"code": error.code, "message": error.message, "param": error.param},
    )


def retry_or_fail(
    session: Session, lease: Lease, error: LuthierError, *, max_attempts: int, pause_seconds: float = 0.0
) -> JobStatus:
    """End a crashed attempt: the job is queued again, or fails after `max_attempts` crashes.

    The next attempt goes to another worker, where a live one can run the job. Crashes on one machine alone
    fail a job only when no other can run it.

    Args:
        pause_seconds: how long the attempt after the next one waits; it doubles from then on.
    """
    job = hold(session, lease)
    if _is_stopping(session, job):
        return _end_broken(session, job, error, outcome="stopped")
    job.num_crashes += 1
    _avoid(job, lease.worker_id)
    if job.num_crashes > 1:
        _pause(job, pause_seconds, job.num_crashes - 1)
    is_last = job.num_crashes >= max_attempts and (
        len({workers.machine_of(worker_id) for worker_id in job.avoided_workers}) > 1
        or session.scalar(select(Job.id).where(Job.id == job.id, workers.is_avoided_by_others())) is not None
    )
    if is_last:
        return _end_failed(session, job, error, f"This was attempt {job.num_crashes} of {max_attempts}")
    return _end_broken(session, job, error, outcome="crashed")


def _is_stopping(session: Session, job: Job) -> bool:
    """Whether an attempt was asked to stop, by its worker or by a pause: its end is no crash."""
    return attempts.is_stopping(session, job) or job.status in (JobStatus.PAUSING, JobStatus.QUEUED)


def _avoid(job: Job, worker_id: str) -> None:
    """Leave a job to other workers for some minutes after it may be tried again."""
    job.not_before = func.now()
    if worker_id not in job.avoided_workers:
        job.avoided_workers = [*job.avoided_workers, worker_id]


def _pause(job: Job, seconds: float, num_before: int) -> None:
    """Delay a job: exponential backoff with jitter."""
    pause_seconds = min(_MAX_PAUSE_SECONDS, seconds * 2 ** (num_before - 1)) * random.uniform(0.75, 1.25)
    job.not_before = func.now() + timedelta(seconds=pause_seconds)


def _end_failed(session: Session, job: Job, error: LuthierError, why: str) -> JobStatus:
    message = f"{error.message} {why}, so the job has failed."
    event = NewEvent(message, level="error", data={"code": error.code})
    body = {"code": error.code, "message": message, "param": error.param}
    return _end(session, job, JobStatus.FAILED, outcome="crashed", event=event, error=body)


def _end_broken(session: Session, job: Job, error: LuthierError, *, outcome: str) -> JobStatus:
    status = WAITS_AS[JobStatus(job.status)]
    how = "is paused at" if status is JobStatus.PAUSED else "continues from"
    where = "its last save point" if job.save_points else "its beginning"
    message = f"{error.message} The job {how} {where}."
    event = NewEvent(message, level="warn", data={"code": error.code})
    return _end(session, job, status, outcome=outcome, event=event)


def put_off(
    session: Session, lease: Lease, error: LuthierError, *, pause_seconds: float, is_machine: bool
) -> JobStatus:
    """End an attempt that met an unavailable or missing resource: the job waits, longer each time.

    A retryable `UnavailableError` is waited for without end. Any other error fails the job after
    `_MAX_FAULTS` tries in a row with the same code.
    """
    job = hold(session, lease)
    # Not by its message, which may name a worker or a time.
    is_new = job.fault_code != error.code
    job.num_faults = 1 if is_new else job.num_faults + 1
    job.fault_code = error.code
    if is_machine:
        _avoid(job, lease.worker_id)
    _pause(job, pause_seconds, job.num_faults)
    if job.num_faults >= _MAX_FAULTS and not (isinstance(error, UnavailableError) and error.retryable):
        fail(session, lease, error)
        return JobStatus.FAILED
    event = NewEvent(f"The job waits: {error.message}", level="warn", data={}) if is_new else None
    return wait_again(session, lease, outcome="unavailable", event=event)


def sweep(session: Session, *, limit: int = 100) -> Sequence[str]:
    """Take jobs from workers whose lease has expired, at most `limit`; return their ids.

    Not a crash of the job. The caller has seen the database for as long as a lease lasts, so that after an
    outage the workers that train renew first. Two sweepers never take the same job.
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
    error = WorkerCrashedError("The worker stopped answering.")
    for job in lost:
        if _is_stopping(session, job):
            _end_broken(session, job, error, outcome="stopped")
            continue
        job.num_losses += 1
        if job.num_losses >= _MAX_LOSSES:
            why = f"That was the case in {job.num_losses} attempts without progress"
            _end_failed(session, job, error, why)
            continue
        if job.num_losses > 2:
            _pause(job, _LOSS_PAUSE_SECONDS, job.num_losses - 2)
        _end_broken(session, job, error, outcome="lost")
    return [job.id for job in lost]
