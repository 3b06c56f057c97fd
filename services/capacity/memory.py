"""Memory of a device for training: which queued job may start beside those that run there.

A setting splits a device's bytes between training and serving (luthier/core/devices.py). Jobs are admitted to
training's part under a lock of the device, so that two workers never both give out the last bytes; what
serving lends to a job (worker/tasks/train.py: Loan) is on top. A grant carries its
attempt's fencing token and lapses with its lease.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.orm import Session

from db.queries import lock_key
from db.tables import Job, MemoryGrant
from luthier.core.devices import Device, format_bytes
from luthier.core.errors import OutOfMemoryError
from luthier.core.states import JobStatus
from services.capacity import workers
from services.jobs.queue_order import by_turns

# What a job asks for beyond its estimated peak.
MARGIN = 1.1
# Jobs that are looked at in one claim.
_MAX_CANDIDATES = 20


@dataclass(frozen=True)
class Waiting:
    """A job that lacks `missing_bytes` on a device now, and can't start without `least_bytes` of them."""

    job_id: str
    wanted_bytes: int
    missing_bytes: int
    least_bytes: int
    held_bytes: int


def find_refusal(job: Job, device: Device) -> OutOfMemoryError | None:
    """Return why a prepared job can never run on a device, with the numbers; None where it can."""
    if (job.least_bytes or 0) <= device.total_bytes:
        return None
    return OutOfMemoryError(
        f"The job needs about {format_bytes(job.least_bytes or 0)} of memory, and {device} has "
        f"{format_bytes(device.total_bytes)} for jobs and serving. Use a smaller training.max_length, a "
        "smaller base, or a method with fewer parameters."
    )


def choose(
    session: Session,
    device: Device | None,
    *,
    fits: ColumnElement[bool],
    lent: tuple[str, int] = ("", 0),
    is_final: bool = True,
    on_wait: Callable[[Waiting], None] = lambda _: None,
) -> tuple[Job, int] | None:
    """Return the first queued job in turn whose memory is free on a device, locked; one that never fits, too.

    One that fits once others have ended is not overtaken. One that needs some of serving's part is.

    Args:
        device: where the job would run; None where its memory is not known and not counted.
        lent: a job, and the bytes of serving's part that it may have.

    Returns:
        The job and what it gets of training's part; None when none waits, or none fits.
    """
    in_turn = select(Job.id).where(is_queued(), fits).order_by(*by_turns("train")).limit(_MAX_CANDIDATES)
    candidates = session.scalars(in_turn).all()
    held_bytes = _lock(session, device) if candidates and device is not None else 0
    for job_id in candidates:
        job = _take(session, job_id)
        if job is None:
            continue
        if device is None:
            return job, 0
        if find_refusal(job, device) is not None:
            if workers.has_device(session, job.least_bytes or 0):
                continue
            # It is about to fail, without a process.
            return job, 0
        lent_bytes = lent[1] if lent[0] == job.id else 0
        free_bytes = device.training_bytes - held_bytes + lent_bytes
        wanted_bytes = min(int((job.peak_bytes or 0) * MARGIN), device.total_bytes)
        if wanted_bytes <= free_bytes:
            return job, max(0, wanted_bytes - lent_bytes)
        # A peak that training can stay below by smaller micro-batches.
        is_rough = (job.least_bytes or 0) < (job.peak_bytes or 0)
        least_bytes = job.least_bytes or 0 if is_rough else wanted_bytes
        if is_final and held_bytes == 0 and least_bytes <= free_bytes:
            return job, device.training_bytes
        needed_bytes = least_bytes if held_bytes == 0 else wanted_bytes
        on_wait(
            Waiting(
                job.id,
                wanted_bytes,
                missing_bytes=wanted_bytes - free_bytes,
                least_bytes=max(1, needed_bytes - free_bytes),
                held_bytes=held_bytes,
            )
        )
        if least_bytes <= device.training_bytes:
            return None
    return None


def _lock(session: Session, device: Device) -> int:
    """Lock a device's memory until the transaction ends; return what jobs hold of it."""
    lock_key(session, f"memory of {device}")
    is_on = (MemoryGrant.hostname == device.hostname) & (MemoryGrant.device == device.name)
    held = select(func.coalesce(func.sum(MemoryGrant.num_bytes), 0)).where(
        is_on, MemoryGrant.expires_at > func.now()
    )
    return int(session.scalar(held) or 0)


def is_queued() -> ColumnElement[bool]:
    """Select the jobs that wait to be trained."""
    return (Job.status == JobStatus.QUEUED) & Job.lease_owner.is_(None) & Job.deleted_at.is_(None) & is_due()


def is_due() -> ColumnElement[bool]:
    """Select the jobs that are not waiting for a later time."""
    return or_(Job.not_before.is_(None), Job.not_before <= func.now())


def _take(session: Session, job_id: str) -> Job | None:
    statement = select(Job).where(Job.id == job_id, is_queued()).with_for_update(skip_locked=True)
    return session.scalar(statement.execution_options(populate_existing=True))


def note_waiting(session: Session, device: Device, waiting: Waiting) -> None:
    """Say in an event of a job what memory it waits for; once for each change."""
    free_bytes = device.training_bytes - waiting.held_bytes
    # Not which jobs: they may be another project's.
    others = f"other jobs hold {format_bytes(waiting.held_bytes)}, " if waiting.held_bytes else ""
    what = (
        f"{format_bytes(waiting.wanted_bytes)} of memory on {device}: of training's "
        f"{format_bytes(device.training_bytes)}, {format_bytes(free_bytes)} are free, {others}and serving "
        f"can lend too little of its {format_bytes(device.serving_bytes)}"
    )
    numbers = {"wanted_bytes": waiting.wanted_bytes, "free_bytes": free_bytes}
    numbers |= {"jobs_bytes": waiting.held_bytes, "serving_bytes": device.serving_bytes}
    workers.note_waiting(session, waiting.job_id, what, numbers)


def grant(session: Session, device: Device, job: Job, num_bytes: int, lease_seconds: float) -> None:
    """Give a job that `choose` returned its memory, under the fencing token of its row."""
    session.add(
        MemoryGrant(
            hostname=device.hostname,
            device=device.name,
            job_id=job.id,
            lease_epoch=job.lease_epoch,
            num_bytes=num_bytes,
            expires_at=func.now() + timedelta(seconds=lease_seconds),
        )
    )


def renew(session: Session, job_id: str, fencing_token: int, lease_seconds: float) -> None:
    """Keep an attempt's grant for as long as its lease."""
    session.execute(
        update(MemoryGrant)
        .where(MemoryGrant.job_id == job_id, MemoryGrant.lease_epoch == fencing_token)
        .values(expires_at=func.now() + timedelta(seconds=lease_seconds))
    )


def release(session: Session, job_id: str, fencing_token: int) -> None:
    """End an attempt's grant, once its process is gone; what a later attempt was given stays."""
    _delete(session, MemoryGrant.job_id == job_id, MemoryGrant.lease_epoch == fencing_token)


def forget_lapsed(session: Session) -> None:
    """Delete the grants of attempts that are gone; they count for nothing already."""
    _delete(session, MemoryGrant.expires_at < func.now())


def _delete(session: Session, *which: ColumnElement[bool]) -> None:
    session.execute(delete(MemoryGrant).where(*which))
