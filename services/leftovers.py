"""What ended jobs leave in storage: what of it lives on, and that the rest is gone."""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db.tables import File, Job, Model
from luthier.core.states import TERMINAL_STATUSES


@dataclass(frozen=True)
class EndedJob:
    """A job that has ended, and where in storage lies what lives on: its models' artifacts, its results."""

    job_id: str
    project_id: str
    kept_prefixes: tuple[str, ...]


def list_untidied(session: Session, *, grace_seconds: float, limit: int) -> list[EndedJob]:
    """Return ended jobs whose working copies (tokenised rows, save points) are still in storage.

    Args:
        session: the session.
        grace_seconds: how long ago they ended: a worker that has not heard of it may still write.
        limit: jobs at once.

    Returns:
        The jobs, those that ended first before others.
    """
    rows = session.execute(
        select(Job.id, Job.project_id, File.storage_key)
        .outerjoin(File, (File.id == Job.result_file_id) & File.deleted_at.is_(None))
        .where(
            Job.status.in_(TERMINAL_STATUSES),
            Job.tidied_at.is_(None),
            Job.finished_at < func.now() - timedelta(seconds=grace_seconds),
        )
        .order_by(Job.finished_at)
        .limit(limit)
    ).all()
    ended = []
    for job_id, project_id, result_key in rows:
        kept = session.scalars(
            select(Model.artifact_key).where(Model.job_id == job_id, Model.deleted_at.is_(None))
        ).all()
        ended.append(EndedJob(job_id, project_id, (*kept, *([result_key] if result_key else []))))
    return ended


def mark_tidied(session: Session, job_id: str) -> None:
    """Note that an ended job's working copies are gone."""
    session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(tidied_at=func.now(), prepared_key=None, save_points=[])
        .execution_options(synchronize_session=False)
    )
