"""Garbage collection of storage: what ended jobs and uploads still keep, and what was collected."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from db.tables import File, Job, Model, Upload, UploadPart
from luthier.core.states import TERMINAL_STATUSES
from services.files import uploads
from services.files.uploads import UploadStatus


@dataclass(frozen=True)
class EndedJob:
    """A job that has ended, and the storage prefixes that stay: its models' artifacts, its results."""

    job_id: str
    project_id: str
    kept_prefixes: tuple[str, ...]


@dataclass(frozen=True)
class EndedUpload:
    """An ended upload, and the key of the file that it became, where that still exists."""

    upload_id: str
    project_id: str
    kept_key: str | None


def list_uncollected(
    session: Session, *, grace_seconds: float, limit: int, skipped: Collection[str] = ()
) -> list[EndedJob]:
    """Return ended jobs whose working copies (tokenised rows, save points) are still in storage."""
    rows = session.execute(
        select(Job.id, Job.project_id, File.storage_key)
        .outerjoin(File, (File.id == Job.result_file_id) & File.deleted_at.is_(None))
        .where(
            Job.status.in_(TERMINAL_STATUSES),
            Job.tidied_at.is_(None),
            Job.finished_at < func.now() - timedelta(seconds=grace_seconds),
            Job.id.not_in(skipped),
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


def mark_collected(session: Session, job_id: str) -> None:
    """Record that an ended job's working copies are deleted."""
    session.execute(
        update(Job)
        .where(Job.id == job_id)
        .values(tidied_at=func.now(), prepared_key=None, save_points=[])
        .execution_options(synchronize_session=False)
    )


def list_uncollected_uploads(
    session: Session, *, grace_seconds: float, limit: int, skipped: Collection[str] = ()
) -> list[EndedUpload]:
    """Return uploads at their end whose parts may still be in storage; what has lapsed is expired first."""
    uploads.expire_lapsed(session)
    rows = session.execute(
        select(Upload.id, Upload.project_id, File.storage_key)
        .outerjoin(File, (File.id == Upload.file_id) & File.deleted_at.is_(None))
        .where(
            Upload.status != UploadStatus.PENDING.value,
            Upload.tidied_at.is_(None),
            Upload.ended_at <= func.now() - timedelta(seconds=grace_seconds),
            Upload.id.not_in(skipped),
        )
        .order_by(Upload.ended_at)
        .limit(limit)
    ).all()
    return [EndedUpload(*row) for row in rows]


def mark_upload_collected(session: Session, upload_id: str) -> None:
    """Record that the bytes of an upload's parts are deleted, and delete the parts' rows."""
    session.execute(delete(UploadPart).where(UploadPart.upload_id == upload_id))
    session.execute(
        update(Upload)
        .where(Upload.id == upload_id)
        .values(tidied_at=func.now())
        .execution_options(synchronize_session=False)
    )
