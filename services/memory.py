"""The ledger of memory: which queued job may start on a device, beside what jobs and serving hold of it.

Everything is added up under the lock of the device's row, so that two who ask never both get the last bytes;
giving back needs no lock. A grant is under its attempt's fence, and lapses with its lease. What the inference
server holds is in services/serving.py. All times are the database's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, case, delete, func, or_, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db.memory_tables import MemoryDevice, MemoryGrant
from db.tables import Job
from luthier.core.devices import Device
from luthier.core.errors import OutOfMemoryError
from luthier.core.states import JobStatus
from services import events
from services.events import NewEvent
from services.turns import by_turns

JOB, SERVING = "job", "serving"
# What a job asks for beyond its estimated peak.
MARGIN = 1.1
# How long others that fit may go before the first in line.
PATIENCE_SECONDS = 300.0
# Jobs that are looked at in one claim.
_MAX_CANDIDATES = 20
# A device from which no worker was heard for so long takes no job.
_DEVICE_SECONDS = 60


def lock_device(session: Session, device: Device) -> None:
    """Hold a device's row until the transaction ends: nobody else is given anything of it meanwhile."""
    values = {"total_bytes": device.total_bytes, "seen_at": func.now()}
    session.execute(
        insert(MemoryDevice)
        .values(hostname=device.hostname, device=device.name, **values)
        .on_conflict_do_update(index_elements=["hostname", "device"], set_=values)
    )


def is_on(device: Device) -> ColumnElement[bool]:
    """Select the live rows of a device."""
    return (
        (MemoryGrant.hostname == device.hostname)
        & (MemoryGrant.device == device.name)
        & (MemoryGrant.expires_at > func.now())
    )


def wanted_bytes(peak_bytes: int | None, device: Device) -> int:
    """Return what a job asks for on a device; nothing where prepare, of an older version, told no peak."""
    return min(int((peak_bytes or 0) * MARGIN), device.total_bytes)


def find_refusal(job: Job, device: Device) -> OutOfMemoryError | None:
    """Return why a prepared job can never run on a device, with the numbers; None where it can."""
    if not _is_too_large(job.least_bytes, device):
        return None
    return OutOfMemoryError(
        f"The job needs about {told_bytes(job.least_bytes or 0)} of memory, and {device} has "
        f"{told_bytes(device.total_bytes)} for jobs and serving. Use a smaller training.max_length, a "
        "smaller base, or a method with fewer parameters."
    )


def _is_too_large(least_bytes: int | None, device: Device) -> bool:
    return (least_bytes or 0) > device.total_bytes


def choose(
    session: Session,
    device: Device,
    *,
    lease_seconds: float,
    tells: bool,
    fits: ColumnElement[bool],
) -> tuple[Job, int] | None:
    """Return the first queued job in turn that fits on a device now, locked; one that never fits, too.

    Jobs that don't fit yet are noted as waiting. Others may go before them until the first in line has waited
    for `PATIENCE_SECONDS` for what other jobs hold: then it is its turn. One whose number is rough does not
    wait for serving alone, whose part does not end: it gets what there is.

    Args:
        device: where the job would run; locked until the transaction ends if any job waits.
        lease_seconds: after which a waiting job that nobody looked at again counts as gone.
        tells: whether serving has given back what it can, so that jobs which must wait are told so; once for
            each change of what they wait for.
        fits: which jobs the worker may take and its machine can run.

    Returns:
        The job and what it gets; None when none waits, or none fits.
    """
    candidates = session.execute(
        select(Job.id, Job.peak_bytes, Job.least_bytes)
        .where(is_queued(), fits)
        .order_by(*by_turns("train"))
        .limit(_MAX_CANDIDATES)
    ).all()
    if not candidates:
        return None
    lock_device(session, device)
    held = session.scalars(select(MemoryGrant).where(is_on(device), MemoryGrant.num_bytes > 0)).all()
    free_bytes = device.total_bytes - sum(row.num_bytes for row in held)
    is_last_word = tells and all(row.kind == SERVING for row in held)
    for candidate in candidates:
        is_too_large = _is_too_large(candidate.least_bytes, device)
        if is_too_large and _fits_elsewhere(session, candidate.least_bytes or 0):
            continue
        wanted = wanted_bytes(candidate.peak_bytes, device)
        job = _take(session, candidate.id)
        if job is None:
            continue
        if is_too_large:
            # It is about to fail, without a process.
            return job, 0
        if wanted == 0 or wanted <= free_bytes:
            return job, wanted
        if is_last_word and _is_rough(job) and (job.least_bytes or 0) <= free_bytes:
            return job, free_bytes
        row = _wait(session, device, job, wanted, lease_seconds)
        if tells:
            _tell(session, device, row, held)
        if row.waited_seconds > PATIENCE_SECONDS and _ends_with_jobs(device, wanted, held):
            return None
    return None


def _is_rough(job: Job) -> bool:
    """Whether a job's peak was not measured: then what it can't do without is told apart from it."""
    return (job.least_bytes or 0) < (job.peak_bytes or 0)


def find_oldest(session: Session, fits: ColumnElement[bool]) -> Job | None:
    """Return the queued job whose turn it is, locked, whatever memory it needs; None when none waits."""
    in_turn = select(Job.id).where(is_queued(), fits).order_by(*by_turns("train")).limit(_MAX_CANDIDATES)
    for job_id in session.scalars(in_turn).all():
        job = _take(session, job_id)
        if job is not None:
            return job
    return None


def is_waited_for(session: Session, device: Device) -> bool:
    """Whether a job waits for memory of a device."""
    return session.scalar(select(find_waiting(device).exists())) is True


def find_waiting(device: Device) -> Select[Any]:
    """Select the jobs that wait for memory of a device, the oldest first."""
    is_waiting = is_on(device) & (MemoryGrant.kind == JOB) & (MemoryGrant.lease_epoch == 0)
    return (
        select(MemoryGrant)
        .join(Job, Job.id == MemoryGrant.holder_id)
        .where(is_waiting, is_queued())
        .order_by(Job.created_at)
    )


def is_queued() -> ColumnElement[bool]:
    """Select the jobs that wait to be trained."""
    return (Job.status == JobStatus.QUEUED) & Job.lease_owner.is_(None) & Job.deleted_at.is_(None) & is_due()


def is_due() -> ColumnElement[bool]:
    """Select the jobs that are not waiting for a later time."""
    return or_(Job.not_before.is_(None), Job.not_before <= func.now())


def _take(session: Session, job_id: str) -> Job | None:
    statement = select(Job).where(Job.id == job_id, is_queued()).with_for_update(skip_locked=True)
    return session.scalar(statement.execution_options(populate_existing=True))


def _fits_elsewhere(session: Session, least_bytes: int) -> bool:
    is_alive = MemoryDevice.seen_at > func.now() - timedelta(seconds=_DEVICE_SECONDS)
    larger = select(MemoryDevice.device).where(is_alive, MemoryDevice.total_bytes >= least_bytes).limit(1)
    return session.scalar(larger) is not None


def _ends_with_jobs(device: Device, wanted: int, held: Sequence[MemoryGrant]) -> bool:
    """Whether a job would fit once others end, beside what serving can never give back."""
    floor_bytes = sum(row.floor_bytes for row in held if row.kind == SERVING)
    return wanted + floor_bytes <= device.total_bytes


@dataclass(frozen=True)
class _Waiting:
    """A job that waits: for how much, what it was told of that, and for how long."""

    job_id: str
    wanted_bytes: int
    told: str | None
    waited_seconds: float


def key_of(device: Device, kind: str, holder_id: str, epoch: int = 0) -> dict[str, Any]:
    """Return the columns by which a row of the ledger is found."""
    place = {"hostname": device.hostname, "device": device.name}
    return {**place, "kind": kind, "holder_id": holder_id, "lease_epoch": epoch}


def _wait(session: Session, device: Device, job: Job, wanted: int, lease_seconds: float) -> _Waiting:
    """Note that a job waits."""
    values = {
        "wanted_bytes": wanted,
        "floor_bytes": (job.least_bytes or 0) if _is_rough(job) else wanted,
        "expires_at": func.now() + timedelta(seconds=lease_seconds),
    }
    is_new = MemoryGrant.expires_at < func.now()
    found = session.execute(
        insert(MemoryGrant)
        .values(**key_of(device, JOB, job.id), num_bytes=0, **values)
        .on_conflict_do_update(
            index_elements=list(key_of(device, JOB, job.id)),
            set_=values | {"since": case((is_new, func.now()), else_=MemoryGrant.since)},
        )
        .returning(MemoryGrant.told, func.extract("epoch", func.now() - MemoryGrant.since))
    ).one()
    return _Waiting(job.id, wanted, found[0], float(found[1]))


def _tell(session: Session, device: Device, waiting: _Waiting, held: Sequence[MemoryGrant]) -> None:
    """Tell a job what it waits for, unless it waits for the same as before."""
    # By who holds, not how much: what serving holds changes with every answer.
    holders = ",".join(sorted(f"{row.holder_id}/{row.lease_epoch}" for row in held))
    told = f"{waiting.wanted_bytes} {holders}"
    if waiting.told == told:
        return
    session.execute(update(MemoryGrant).filter_by(**key_of(device, JOB, waiting.job_id)).values(told=told))
    serving = sum(row.num_bytes for row in held if row.kind == SERVING)
    jobs = [row.num_bytes for row in held if row.kind == JOB]
    parts = [f"serving holds {told_bytes(serving)}"] if serving else []
    if jobs:
        # Not which: they may be another project's.
        who = "another job holds" if len(jobs) == 1 else f"{len(jobs)} other jobs hold"
        parts.append(f"{who} {told_bytes(sum(jobs))}")
    parts.append(f"all is {told_bytes(device.total_bytes)}")
    message = f"Waiting for {told_bytes(waiting.wanted_bytes)} on {device} ({', '.join(parts)})"
    data = {"wanted_bytes": waiting.wanted_bytes, "total_bytes": device.total_bytes}
    data |= {"serving_bytes": serving, "jobs_bytes": sum(jobs)}
    events.append(session, waiting.job_id, [NewEvent(message, data=data)])


def grant(session: Session, device: Device, job: Job, num_bytes: int, lease_seconds: float) -> None:
    """Give a job that `choose` returned its memory, under the epoch that its row has now."""
    session.execute(
        delete(MemoryGrant).where(
            MemoryGrant.kind == JOB, MemoryGrant.holder_id == job.id, MemoryGrant.lease_epoch == 0
        )
    )
    session.add(
        MemoryGrant(
            **key_of(device, JOB, job.id, job.lease_epoch),
            num_bytes=num_bytes,
            wanted_bytes=wanted_bytes(job.peak_bytes, device),
            expires_at=func.now() + timedelta(seconds=lease_seconds),
        )
    )
    session.flush()


def renew(session: Session, job_id: str, epoch: int, lease_seconds: float) -> None:
    """Keep an attempt's grant for as long as its lease."""
    session.execute(
        update(MemoryGrant)
        .where(*_is_of(job_id, epoch))
        .values(expires_at=func.now() + timedelta(seconds=lease_seconds))
        .execution_options(synchronize_session=False)
    )


def release(session: Session, job_id: str, epoch: int) -> None:
    """End an attempt's grant, once its process is gone; what a later attempt was given stays."""
    session.execute(
        delete(MemoryGrant).where(*_is_of(job_id, epoch)).execution_options(synchronize_session=False)
    )


def _is_of(job_id: str, epoch: int) -> tuple[ColumnElement[bool], ...]:
    return (
        MemoryGrant.kind == JOB,
        MemoryGrant.holder_id == job_id,
        MemoryGrant.lease_epoch == epoch,
    )


def forget_lapsed(session: Session) -> None:
    """Delete the rows of owners that are gone; they count for nothing already."""
    key = [getattr(MemoryGrant, column.name) for column in MemoryGrant.__table__.primary_key]
    lapsed = select(*key).where(MemoryGrant.expires_at < func.now()).with_for_update(skip_locked=True)
    session.execute(
        delete(MemoryGrant).where(tuple_(*key).in_(lapsed)).execution_options(synchronize_session=False)
    )


def told_bytes(num_bytes: int) -> str:
    """Return bytes as users read them."""
    if num_bytes >= 100_000_000:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.1f} MB"
