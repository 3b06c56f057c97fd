"""Pause and resume: the requests of clients, and the end of an attempt that was asked to stop.

A paused job holds no slot and no lease, without a limit of time; its save points and files stay. It resumes
from the newest save point and ends with the same bytes as without the pause.
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
    """Pause a job: a queued one at once, a running one at its next step (`pausing` until then)."""
    job = jobs.get(session, principal, job_id, for_update=True)
    status = JobStatus(job.status)
    if status is JobStatus.QUEUED:
        if job.lease_owner is not None:
            # Its attempt is still stopping, for an earlier pause. A paused job has no lease, so that attempt
            # ends here; what it did after its last save point is done again.
            attempts.end(session, job.id, job.lease_epoch, "paused")
        job.status = JobStatus.PAUSED.value
        job.lease_owner = job.lease_expires_at = job.estimated_finish_at = None
        message = f"The job was paused {_place(job)}"
    elif status is JobStatus.RUNNING:
        job.status = JobStatus.PAUSING.value
        message = "The job is pausing"
    else:
        raise InvalidTransitionError(f"Job {job.id} {_why_not_paused(status)}")
    return _changed(session, job, message)


def _why_not_paused(status: JobStatus) -> str:
    if status.is_terminal:
        return f"has already ended with status {status.value}, so it can't be paused."
    if status is JobStatus.VALIDATING_FILES:
        return "has status validating_files; it can be paused once it is queued or running."
    return f"has status {status.value} already, so it can't be paused again."


def resume(session: Session, principal: Principal, notify: Notify, job_id: str) -> Job:
    """Resume a paused or pausing job from its newest save point; it is `queued`."""
    job = jobs.get(session, principal, job_id, for_update=True)
    status = JobStatus(job.status)
    if status not in (JobStatus.PAUSED, JobStatus.PAUSING):
        how = f"has already ended with status {status.value}" if status.is_terminal else f"is {status.value}"
        raise InvalidTransitionError(f"Job {job.id} {how}; only a paused job can be resumed.")
    job.status = JobStatus.QUEUED.value
    job.not_before = None
    notify_after_commit(session, notify, job.id)
    return _changed(session, job, "The job was resumed")


def _changed(session: Session, job: Job, message: str) -> Job:
    session.flush()
    events.append(session, job.id, [NewEvent(message, data={})])
    return job


def _place(job: Job) -> str:
    """Return where a job resumes, in words."""
    return f"at step {job.save_points[-1]['step']}" if job.save_points else "at its beginning"


def end_stopped(session: Session, lease: Lease) -> JobStatus:
    """End an attempt that was asked to stop, by a pause or by its worker; return the job's status."""
    job = leases.hold(session, lease)
    place = _place(job)
    if job.status == JobStatus.PAUSING:
        outcome, message = "paused", f"The job was paused {place}"
    elif job.status == JobStatus.QUEUED:
        outcome, message = "paused", f"The job waits for a worker {place}"
    else:
        outcome, message = "given_back", f"The worker is stopping; the job waits for another {place}"
    return leases.wait_again(session, lease, outcome=outcome, event=NewEvent(message, data={}))
