"""Workers: heartbeats, which jobs each can run, and quarantine.

A worker's row lists what it has. A job that no worker can run waits, with an event that says why; it does not
fail. A worker whose training processes die at once is quarantined: it claims no training, with growing
pauses, until a test of its own succeeds. All times are the database's.
"""

import os
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, and_, delete, false, func, or_, select, true, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from db.tables import Job, Worker
from luthier.core.states import JobStatus
from services.jobs import events
from services.jobs.events import NewEvent

# A worker without a heartbeat for this long counts as gone.
ALIVE_SECONDS = 30
# After this time its row is of no use.
_KEPT_SECONDS = 24 * 3600
# Training processes that died at once, of different jobs and in all, after which a worker is quarantined.
_MAX_DEATHS_OF_JOBS = 2
_MAX_DEATHS = 3
_MAX_QUARANTINE_SECONDS = 3600.0
# How long the test of one process of a worker keeps the others from testing too.
_TEST_SECONDS = 180
_WAITING_AT_ONCE = 50
_OF_A_PROCESS = re.compile(r"-\d+-[0-9a-f]{8}$")
# How long a job that may be tried again is kept from the workers that it avoids.
_AVOIDED_SECONDS = 300


def beat(session: Session, worker_id: str, *, hostname: str, num_slots: int, facts: dict[str, Any]) -> None:
    """Say that a worker is alive, and what it has."""
    values = {"hostname": hostname, "num_slots": num_slots, "facts": facts, "heartbeat_at": func.now()}
    session.execute(
        insert(Worker)
        .values(id=worker_id, **values)
        .on_conflict_do_update(index_elements=[Worker.id], set_=values)
    )


def make_id(hostname: str) -> str:
    """Return a new worker's id, by which its machine is known when its row is gone."""
    return f"{hostname}-{os.getpid()}-{secrets.token_hex(4)}"


def machine_of(worker_id: str) -> str:
    """Return the host name in a worker's id: a worker that starts again has another id."""
    return _OF_A_PROCESS.sub("", worker_id)


def retire(session: Session, worker_id: str) -> None:
    """Forget a worker that has stopped in order, so that no job waits for it."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def forget_gone(session: Session) -> None:
    """Delete the rows of workers that were killed a day ago or more."""
    is_gone = Worker.heartbeat_at < func.now() - timedelta(seconds=_KEPT_SECONDS)
    session.execute(delete(Worker).where(is_gone))


def lock(session: Session, worker_id: str) -> Worker:
    """Return a worker's row, locked: two processes of one worker never take the same slot."""
    # It is there before the first heartbeat too.
    session.execute(
        insert(Worker)
        .values(id=worker_id, hostname="", num_slots=0, facts={})
        .on_conflict_do_nothing(index_elements=[Worker.id])
    )
    return session.scalars(
        select(Worker)
        .where(Worker.id == worker_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()


def _is_alive() -> ColumnElement[bool]:
    return Worker.heartbeat_at > func.now() - timedelta(seconds=ALIVE_SECONDS)


def _has_base() -> ColumnElement[bool]:
    # One of an older version does not say what it has.
    return or_(~Worker.facts.has_key("bases"), Worker.facts["bases"].has_key(Job.base_id))


def has_fetched(session: Session, base_id: str) -> bool:
    """Return whether a live worker says that it has a base, not only that it would fetch it."""
    has_it = Worker.facts["bases"][base_id].astext.is_not(None)
    return session.scalar(select(Worker.id).where(_is_alive(), has_it).limit(1)) is not None


def has_device(session: Session, num_bytes: int) -> bool:
    """Return whether a live worker has a device with so much memory for jobs and serving."""
    is_large = Worker.facts["device_bytes"].astext.cast(BigInteger) >= num_bytes
    return session.scalar(select(Worker.id).where(_is_alive(), is_large).limit(1)) is not None


def _can_take_over() -> ColumnElement[bool]:
    """Select the live workers that a job does not avoid and, by what they say of themselves, can run it."""
    digest = Worker.facts["bases"][Job.base_id].astext
    is_unchecked = Job.status == JobStatus.VALIDATING_FILES
    device_bytes = Worker.facts["device_bytes"].astext.cast(BigInteger)
    return and_(
        _is_alive(),
        _has_base(),
        or_(is_unchecked, digest.is_(None), digest == Job.spec["base"]["digest"].astext),
        or_(is_unchecked, device_bytes.is_(None), device_bytes >= func.coalesce(Job.least_bytes, 0)),
        ~Job.avoided_workers.has_key(Worker.id),
    )


def is_avoided_by_others() -> ColumnElement[bool]:
    """Select the jobs that no other live worker could take over from their last one."""
    return ~select(Worker.id).where(Worker.id != Job.lease_owner, _can_take_over()).exists()


def may_take(worker_id: str) -> ColumnElement[bool]:
    """Select the jobs that a worker may take.

    One that failed there before is left to others that can run it, for some minutes: they may be busy, or
    lack what they say nothing of.
    """
    is_over = func.coalesce(Job.not_before, Job.created_at) < func.now() - timedelta(seconds=_AVOIDED_SECONDS)
    other = select(Worker.id).where(
        Worker.id != worker_id, Worker.quarantine_reason.is_(None), _can_take_over()
    )
    return or_(~Job.avoided_workers.has_key(worker_id), is_over, ~other.exists())


def can_run(bases: Mapping[str, str | None], unreadable: Collection[str]) -> ColumnElement[bool]:
    """Select the jobs that a machine can run, by the digest of each base (None: it would be fetched)."""
    digest = Job.spec["base"]["digest"].astext
    suitable = [
        (Job.base_id == base_id)
        & (or_(Job.status == JobStatus.VALIDATING_FILES, digest == here) if here else true())
        for base_id, here in bases.items()
    ]
    return and_(or_(false(), *suitable), Job.id.not_in(list(unreadable)))


def note_death(session: Session, worker_id: str, job_id: str, *, pause_seconds: float) -> None:
    """Note that a training process died before it said anything; too many of them quarantine the worker."""
    worker = lock(session, worker_id)
    worker.deaths = [*worker.deaths, job_id][-_MAX_DEATHS:]
    is_whole_queue = len(set(worker.deaths)) >= _MAX_DEATHS_OF_JOBS or len(worker.deaths) >= _MAX_DEATHS
    if is_whole_queue or worker.num_quarantines > 0:
        reason = f"its last {len(worker.deaths)} training processes died at once"
        seconds = _quarantine(worker, reason, pause_seconds)
        message = f"A worker ({worker.hostname}) claims nothing to train for {seconds:.0f} s: {reason}"
        events.append(session, job_id, [NewEvent(message, level="warn", data={})])


def note_life(session: Session, worker_id: str) -> None:
    """Note that a training process of the worker has begun: what died before it is forgotten."""
    session.execute(
        update(Worker)
        .where(Worker.id == worker_id, or_(Worker.deaths != [], Worker.num_quarantines > 0))
        .values(deaths=[], num_quarantines=0)
    )


def quarantine(session: Session, worker_id: str, reason: str, *, pause_seconds: float) -> float:
    """Let a worker claim nothing to train for a while, longer each time; return the seconds."""
    return _quarantine(lock(session, worker_id), reason, pause_seconds)


def _quarantine(worker: Worker, reason: str, pause_seconds: float) -> float:
    seconds = float(min(_MAX_QUARANTINE_SECONDS, pause_seconds * 2**worker.num_quarantines))
    worker.num_quarantines += 1
    worker.quarantine_reason = reason
    worker.quarantined_until = func.now() + timedelta(seconds=seconds)
    return seconds


def end_quarantine(session: Session, worker_id: str) -> None:
    """Let a worker claim again. If a process dies at once again, the next pause is longer."""
    session.execute(
        update(Worker).where(Worker.id == worker_id).values(quarantine_reason=None, quarantined_until=None)
    )


@dataclass(frozen=True)
class Quarantine:
    """Why a worker claims nothing to train, and whether it is time for its test."""

    reason: str
    is_due: bool


def find_quarantine(session: Session, worker_id: str) -> Quarantine | None:
    """Return a worker's quarantine or None; the one caller for which `is_due` holds runs the test."""
    reason = session.scalar(select(Worker.quarantine_reason).where(Worker.id == worker_id))
    if reason is None:
        return None
    due = session.scalar(
        update(Worker)
        .where(Worker.id == worker_id, Worker.quarantined_until < func.now())
        .values(quarantined_until=func.now() + timedelta(seconds=_TEST_SECONDS))
        .returning(Worker.id)
    )
    return Quarantine(reason, due is not None)


def note_waiting_jobs(session: Session) -> None:
    """Note in the events of jobs that no live worker can run what they wait for; once for each reason."""
    alive = session.execute(select(Worker.facts, Worker.quarantine_reason).where(_is_alive())).all()
    waiting = session.execute(
        select(Job.id, Job.base_id, Job.status)
        .where(Job.status.in_([JobStatus.QUEUED, JobStatus.VALIDATING_FILES]), Job.lease_owner.is_(None))
        .order_by(Job.created_at)
        .limit(_WAITING_AT_ONCE)
    ).all()
    for job_id, base_id, status in waiting:
        capable = [reason for facts, reason in alive if base_id in facts.get("bases", {base_id: None})]
        if not capable:
            note_waiting(session, job_id, f"a worker that has the base model {base_id}")
        elif status == JobStatus.QUEUED and None not in capable:
            note_waiting(session, job_id, f"a worker that can train: {capable[0]}")


def note_waiting(session: Session, job_id: str, what: str, data: dict[str, Any] | None = None) -> None:
    """Say in an event what a job waits for, unless its last such event says that."""
    changed = session.scalar(
        update(Job)
        .where(Job.id == job_id, Job.waits_for.is_distinct_from(what))
        .values(waits_for=what)
        .returning(Job.id)
    )
    if changed is not None:
        events.append(session, job_id, [NewEvent(f"The job waits for {what}", level="warn", data=data or {})])
