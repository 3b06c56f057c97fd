"""Garbage collection of storage: the bytes that no row needs any more, and what was collected."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.tables import File, Job, Model, Upload, UploadPart
from luthier.core.states import TERMINAL_STATUSES
from services.files import uploads
from services.files.uploads import UploadStatus, storage_prefix


@dataclass(frozen=True)
class Garbage:
    """What a deleted file or model, or an ended upload or job, leaves in storage.

    `key` is a file's object, or else a prefix, under which the kept prefixes stay.
    """

    table: type[File] | type[Model] | type[Upload] | type[Job]
    row_id: str
    key: str
    kept_prefixes: Sequence[str] = ()


def list_garbage(
    session: Session, *, grace_seconds: float, limit: int, skipped: Collection[str] = ()
) -> list[Garbage]:
    """Return bytes that may still be there, at most `limit` of each kind, without those of skipped rows.

    Args:
        grace_seconds: since the end of a job or an upload. Uploads that have lapsed are expired first.
    """
    uploads.expire_lapsed(session)
    ended_before = func.now() - timedelta(seconds=grace_seconds)
    return [
        *_list_deleted(session, File, File.storage_key, limit, skipped),
        *_list_deleted(session, Model, Model.artifact_key, limit, skipped),
        *_list_ended_uploads(session, ended_before, limit, skipped),
        *_list_ended_jobs(session, ended_before, limit, skipped),
    ]


def _list_deleted(
    session: Session,
    table: type[File] | type[Model],
    key: InstrumentedAttribute[str],
    limit: int,
    skipped: Collection[str],
) -> Iterator[Garbage]:
    rows = session.execute(
        select(table.id, key)
        .where(table.deleted_at.is_not(None), table.bytes_deleted_at.is_(None), table.id.not_in(skipped))
        .order_by(table.deleted_at)
        .limit(limit)
    )
    return (Garbage(table, *row) for row in rows)


def _list_ended_uploads(
    session: Session, ended_before: Any, limit: int, skipped: Collection[str]
) -> Iterator[Garbage]:
    """Yield the parts of ended uploads; the file that one became stays."""
    rows = session.execute(
        select(Upload.id, Upload.project_id, File.storage_key)
        .outerjoin(File, (File.id == Upload.file_id) & File.deleted_at.is_(None))
        .where(
            Upload.status != UploadStatus.PENDING.value,
            Upload.tidied_at.is_(None),
            Upload.ended_at <= ended_before,
            Upload.id.not_in(skipped),
        )
        .order_by(Upload.ended_at)
        .limit(limit)
    )
    for upload_id, project_id, file_key in rows:
        yield Garbage(
            Upload, upload_id, storage_prefix(project_id, upload_id), [file_key] if file_key else []
        )


def _list_ended_jobs(
    session: Session, ended_before: Any, limit: int, skipped: Collection[str]
) -> Iterator[Garbage]:
    """Yield the working copies of ended jobs (tokenised rows, save points); models and results stay."""
    rows = session.execute(
        select(Job.id, Job.project_id, File.storage_key)
        .outerjoin(File, (File.id == Job.result_file_id) & File.deleted_at.is_(None))
        .where(
            Job.status.in_(TERMINAL_STATUSES),
            Job.tidied_at.is_(None),
            Job.finished_at < ended_before,
            Job.id.not_in(skipped),
        )
        .order_by(Job.finished_at)
        .limit(limit)
    ).all()
    for job_id, project_id, result_key in rows:
        kept = session.scalars(
            select(Model.artifact_key).where(Model.job_id == job_id, Model.deleted_at.is_(None))
        ).all()
        prefix = f"projects/{project_id}/jobs/{job_id}"
        yield Garbage(Job, job_id, prefix, [*kept, *([result_key] if result_key else [])])


def mark_collected(session: Session, garbage: Garbage) -> None:
    """Record that bytes are deleted."""
    table, now = garbage.table, func.now()
    statement = update(table).where(table.id == garbage.row_id)
    if table is Job:
        statement = statement.values(tidied_at=now, prepared_key=None, save_points=[])
    elif table is Upload:
        session.execute(delete(UploadPart).where(UploadPart.upload_id == garbage.row_id))
        statement = statement.values(tidied_at=now)
    else:
        # A model that became its job's result meanwhile is no deleted one any more, and has other bytes.
        statement = statement.where(table.deleted_at.is_not(None)).values(bytes_deleted_at=now)
    session.execute(statement)
