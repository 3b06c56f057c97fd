"""Events of a job: numbered, announced to listeners; old step events are thinned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Integer, and_, delete, or_, select, text, update
from sqlalchemy.orm import Session

from db.tables import Job, JobEvent
from luthier.core.ids import new_id

CHANNEL = "luthier_job_events"
# Steps that are this many events old, and of how many one is kept: some 3,000 events of a million steps.
_KEPT_ONE_IN = {1_000: 10, 10_000: 100, 100_000: 1_000}
_THIN_EVERY = 1_000
_MAX_THINNED = 5_000


@dataclass(frozen=True)
class NewEvent:
    """An event not yet stored; `data` of a metrics event holds full-precision numbers."""

    message: str
    type: Literal["message", "metrics"] = "message"
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None = None


def append(session: Session, job_id: str, events: Sequence[NewEvent]) -> None:
    """Store events under the next numbers of their job and notify the listeners at commit.

    The update of the job's counter locks its row until the transaction ends, so numbers are gap-free and
    unique.
    """
    if not events:
        return
    owner = session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(last_event_seq=Job.last_event_seq + len(events))
        .returning(Job.last_event_seq, Job.organization_id, Job.project_id)
    ).one()
    first = owner.last_event_seq - len(events) + 1
    session.add_all(
        JobEvent(
            id=new_id("event"),
            organization_id=owner.organization_id,
            project_id=owner.project_id,
            job_id=job_id,
            seq=first + offset,
            level=event.level,
            type=event.type,
            message=event.message,
            data=event.data,
        )
        for offset, event in enumerate(events)
    )
    if first // _THIN_EVERY != (owner.last_event_seq + 1) // _THIN_EVERY:
        _thin(session, job_id, owner.last_event_seq)
    session.execute(text("SELECT pg_notify(:channel, :job)"), {"channel": CHANNEL, "job": job_id})


def _thin(session: Session, job_id: str, last_seq: int) -> None:
    """Delete old steps' events, without which a job of a million steps would keep as many rows."""
    step = JobEvent.data["step"].astext.cast(Integer)
    is_left_out = (
        and_(JobEvent.seq <= last_seq - age, step % kept != 0) for age, kept in _KEPT_ONE_IN.items()
    )
    thinned = (
        select(JobEvent.id)
        .where(
            JobEvent.job_id == job_id,
            JobEvent.type == "metrics",
            # A step whose validation rows were all scored stays.
            JobEvent.data["full_valid_loss"].astext.is_(None),
            or_(*is_left_out),
        )
        # A job that was begun before events were thinned has many more than a statement's timeout allows.
        .limit(_MAX_THINNED)
    )
    session.execute(delete(JobEvent).where(JobEvent.id.in_(thinned)))


def list_after(session: Session, job_id: str, *, seq: int, limit: int) -> Sequence[JobEvent]:
    """Return a job's events with numbers above `seq`, oldest first."""
    return session.scalars(
        select(JobEvent)
        .where(JobEvent.job_id == job_id, JobEvent.seq > seq)
        .order_by(JobEvent.seq)
        .limit(limit)
    ).all()


def list_step_metrics(session: Session, job_id: str) -> list[dict[str, Any]]:
    """Return the data of the metrics events that a job has kept, one a step, in the order of the steps.

    A step that an attempt did again after a save point counts as it was done last.
    """
    rows = session.scalars(
        select(JobEvent.data)
        .where(JobEvent.job_id == job_id, JobEvent.type == "metrics")
        .order_by(JobEvent.seq)
    )
    by_step = {data["step"]: data for data in rows if data is not None}
    return [by_step[step] for step in sorted(by_step)]
