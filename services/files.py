"""Files: rows about bytes that are already durable in storage."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import func, or_, select, update
from sqlalchemy.orm import Session

from db.queries import find_owned, page
from db.tables import File, Job
from luthier.core.errors import FileInUseError, InvalidValueError, NotFoundError
from luthier.core.states import TERMINAL_STATUSES
from services.scope import Scope

RESULTS_PURPOSE = "fine-tune-results"


@dataclass(frozen=True)
class StoredFile:
    """Bytes that are durable under `storage_key`, checked line by line; sizes in bytes."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    num_rows: int
    sha256: str
    storage_key: str


def record(session: Session, scope: Scope, stored: StoredFile) -> File:
    """Make a file exist for its project."""
    row = File(**scope.columns(), **vars(stored))
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def record_result(session: Session, job: Job, stored: StoredFile) -> File:
    """Make the file of a job's results exist in the job's project; the caller names it in the job's row."""
    row = File(
        organization_id=job.organization_id,
        project_id=job.project_id,
        created_by_key_id=job.created_by_key_id,
        **vars(stored),
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, scope: Scope, file_id: str, *, param: str = "id", for_share: bool = False) -> File:
    """Return a file of the project; with `for_share` it can't be deleted until the transaction ends.

    Args:
        session: the session.
        scope: the caller.
        file_id: the file's id.
        param: the field that an error names.
        for_share: keep it from being deleted until the transaction ends.

    Returns:
        The row.

    Raises:
        NotFoundError: when there is none of that id.
    """
    row = find_owned(session, File, scope.project_id, file_id, for_share=for_share)
    if row is None:
        raise NotFoundError(f"No such File object: {file_id[:64]}", param=param)
    return row


def list_(
    session: Session,
    scope: Scope,
    *,
    after: str | None,
    limit: int,
    is_ascending: bool,
    purpose: str | None,
) -> tuple[Sequence[File], bool]:
    """Return a page of the project's files, and whether more follow.

    Args:
        session: the session.
        scope: the caller.
        after: id of the object that ended the page before.
        limit: objects of the page.
        is_ascending: oldest first instead of newest first.
        purpose: only files of this purpose.

    Returns:
        The rows, and whether more follow.

    Raises:
        InvalidValueError: when `after` is no file of the project.
    """
    statement = select(File).where(File.project_id == scope.project_id, File.deleted_at.is_(None))
    if purpose is not None:
        statement = statement.where(File.purpose == purpose)
    cursor = None
    if after is not None:
        cursor = session.scalar(select(File).where(File.project_id == scope.project_id, File.id == after))
        if cursor is None:
            raise InvalidValueError(f"after: no such file: {after[:64]}", param="after")
    return page(session, statement, File, after=cursor, limit=limit, is_ascending=is_ascending)


def delete(session: Session, scope: Scope, file_id: str) -> File:
    """Make a file unknown; the caller deletes its bytes after the commit.

    Args:
        session: the session.
        scope: the caller.
        file_id: the file's id.

    Returns:
        The row.

    Raises:
        NotFoundError: when there is none of that id.
        FileInUseError: when an unfinished job reads it.
    """
    row = find_owned(session, File, scope.project_id, file_id, for_update=True)
    if row is None:
        raise NotFoundError(f"No such File object: {file_id[:64]}", param="id")
    jobs = session.scalars(
        select(Job.id)
        .where(
            or_(Job.training_file_id == file_id, Job.validation_file_id == file_id),
            Job.status.not_in(TERMINAL_STATUSES),
        )
        .limit(5)
    ).all()
    if jobs:
        raise FileInUseError(
            f"{file_id} is read by {', '.join(jobs)}; cancel it or wait for its end, then delete.",
            param="id",
        )
    row.deleted_at = func.now()
    session.flush()
    # A job lists only results that can be fetched.
    session.execute(
        update(Job)
        .where(Job.result_file_id == file_id)
        .values(result_file_id=None)
        .execution_options(synchronize_session=False)
    )
    return row


def list_undeleted_bytes(session: Session, *, limit: int) -> list[tuple[str, str]]:
    """Return id and storage place of deleted files whose bytes may still be there."""
    rows = session.execute(
        select(File.id, File.storage_key)
        .where(File.deleted_at.is_not(None), File.bytes_deleted_at.is_(None))
        .order_by(File.deleted_at)
        .limit(limit)
    ).all()
    return [(row[0], row[1]) for row in rows]


def mark_bytes_deleted(session: Session, row_id: str) -> None:
    """Note that the bytes of one of the deleted files are gone."""
    session.execute(update(File).where(File.id == row_id).values(bytes_deleted_at=func.now()))
