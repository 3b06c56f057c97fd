"""Pause and resume: what a client may ask for, and how an attempt that was asked to stop leaves its job.

A paused job holds no slot and no lease, for as long as it likes; its save points and files stay. It goes on
from the newest save point, to the same bytes as if it had never been paused.
"""

from sqlalchemy.orm import Session

from db.tables import Job
from luthier.core.errors import InvalidTransitionError
from luthier.core.states import JobStatus
from services.accounts.auth import Principal
from services.jobs import attempts, events, jobs, leases
from services.jobs.events import NewEvent
from services.jobs.leases import Lease
from services.task_queue import Notify, notify_after_commit

# Statuses in which the worker that holds a job is to stop its training process: the second is that of a
# job which was resumed while it was pausing.
STOPS_ATTEMPT = frozenset({JobStatus.PAUSING, JobStatus.QUEUED})


def pause(session: Session, principal: Principal, job_id: str) -> Job:
    """Have a job wait: a queued one at once, a running one at its next step.

    Raises:
        InvalidTransitionError: when it is neither queued nor running.
    """
    job = jobs.get(session, principal, job_id, for_update=True)
    status = JobStatus(job.status)
    if status is JobStatus.QUEUED:
        if job.lease_owner is not None:
            # Its attempt is still stopping, for a pause before this one. A paused job is held by nobody, so
            # that attempt ends here; what it did after its last save point is done again.
            attempts.end(session, job.id, job.lease_epoch, "paused")
        job.status = JobStatus.PAUSED.value
        job.lease_owner = job.lease_expires_at = job.estimated_finish_at = None
        told = f"The job was paused {_place(job)}"
    elif status is JobStatus.RUNNING:
        job.status = JobStatus.PAUSING.value
        told = "The job is pausing"
    else:
        raise InvalidTransitionError(f"Job {job.id} {_why_not_paused(status)}")
    return _changed(session, job, told)


def _why_not_paused(status: JobStatus) -> str:
    if status.is_terminal:
        return f"has already ended with status {status.value}, so it can't be paused."
    if status is JobStatus.VALIDATING_FILES:
        return "has status validating_files; it can be paused once it is queued or running."
    return f"has status {status.value} already, so it can't be paused again."


def resume(session: Session, principal: Principal, notify: Notify, job_id: str) -> Job:
    """Let a paused job, or one that is about to be, go on from its newest save point.

    Raises:
        InvalidTransitionError: when it is neither paused nor pausing.
    """
    job = jobs.get(session, principal, job_id, for_update=True)
    status = JobStatus(job.status)
    if status not in (JobStatus.PAUSED, JobStatus.PAUSING):
        how = f"has already ended with status {status.value}" if status.is_terminal else f"is {status.value}"
        raise InvalidTransitionError(f"Job {job.id} {how}; only a paused job can be resumed.")
    job.status = JobStatus.QUEUED.value
    job.not_before = None
    notify_after_commit(session, notify, job.id)
    return _changed(session, job, "The job was resumed")


def _changed(session: Session, job: Job, told: str) -> Job:
    session.flush()
    events.append(session, job.id, [NewEvent(told, data={})])
    session.refresh(job)
    return job


def _place(job: Job) -> str:
    """Return where a job goes on from, in words."""
    return f"at step {job.save_points[-1]['step']}" if job.save_points else "at its beginning"


def end_stopped(session: Session, lease: Lease) -> JobStatus:
    """End an attempt that was asked to stop; whether by a pause or by its worker, the job's row says."""
    job = leases.hold(session, lease)
    place = _place(job)
    if job.status == JobStatus.PAUSING:
        outcome, told = "paused", f"The job was paused {place}"
    elif job.status == JobStatus.QUEUED:
        outcome, told = "paused", f"The job waits for a worker {place}"
    else:
        outcome, told = "given_back", f"The worker is stopping; the job waits for another {place}"
    return leases.wait_again(session, lease, outcome=outcome, event=NewEvent(told, data={}))
