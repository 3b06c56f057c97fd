"""Files: rows about bytes that are already durable in storage."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from db.queries import find_owned, page
from db.tables import File, Job
from luthier.core.errors import FileInUseError, NotFoundError
from luthier.core.states import TERMINAL_STATUSES
from services.accounts.auth import Principal

RESULTS_PURPOSE = "fine-tune-results"


@dataclass(frozen=True)
class StoredFile:
    """Bytes that are durable under `storage_key`, checked as their purpose asks; sizes in bytes.

    `expires_after_seconds` counts from the moment that the file's row is made; None: it never expires.
    `row_format` is a row format's name (luthier.data.formats), None where rows were not looked at.
    """

    id: str
    filename: str
    purpose: str
    num_bytes: int
    num_rows: int
    sha256: str
    storage_key: str
    expires_after_seconds: int | None = None
    row_format: str | None = None

    def columns(self) -> dict[str, Any]:
        """Return the columns of a new row; it expires by the database's clock."""
        columns = dict(vars(self))
        seconds = columns.pop("expires_after_seconds")
        if seconds is not None:
            columns["expires_at"] = func.now() + timedelta(seconds=seconds)
        return columns


def record(session: Session, owner: Principal | Job, stored: StoredFile) -> File:
    """Make a file exist for its project, or as a job's result, which the caller names in the job's row."""
    row = File(**owner.owner_columns(), **stored.columns())
    session.add(row)
    session.flush()
    return row


def is_unexpired() -> ColumnElement[bool]:
    """Return what is true of files whose time is not over, by the database's clock."""
    return or_(File.expires_at.is_(None), File.expires_at > func.now())


def _find(
    session: Session, principal: Principal, file_id: str, *, for_update: bool = False, for_share: bool = False
) -> File | None:
    """Return a file of the project, or None when there is none, or it has expired."""
    row = find_owned(session, File, principal.project_id, file_id, for_update=for_update, for_share=for_share)
    if row is None or row.expires_at is None:
        return row
    is_there = session.scalar(select(is_unexpired()).where(File.id == file_id))
    return row if is_there else None


def get(
    session: Session, principal: Principal, file_id: str, *, param: str = "id", for_share: bool = False
) -> File:
    """Return a file of the project; with `for_share` it can't be deleted until the transaction ends."""
    row = _find(session, principal, file_id, for_share=for_share)
    if row is None:
        raise NotFoundError(f"No such File object: {file_id[:64]}", param=param)
    return row


def list_(
    session: Session,
    principal: Principal,
    *,
    after: str | None,
    limit: int,
    is_ascending: bool,
    purpose: str | None,
) -> tuple[Sequence[File], bool]:
    """Return a page of the project's files, and whether more follow."""
    is_listed = File.project_id == principal.project_id
    filters = [is_unexpired(), *([] if purpose is None else [File.purpose == purpose])]
    return page(session, File, is_listed, *filters, after=after, limit=limit, is_ascending=is_ascending)


def delete(session: Session, principal: Principal, file_id: str) -> File:
    """Make a file unknown unless an unfinished job reads it; its bytes are deleted after the commit."""
    row = _find(session, principal, file_id, for_update=True)
    if row is None:
        raise NotFoundError(f"No such File object: {file_id[:64]}", param="id")
    jobs = session.scalars(select(Job.id).where(*_reads_one_of([file_id])).limit(5)).all()
    if jobs:
        raise FileInUseError(
            f"{file_id} is read by {', '.join(jobs)}; cancel it or wait for its end, then delete.",
            param="id",
        )
    _mark_deleted(session, row)
    return row


def _reads_one_of(file_ids: Sequence[Any]) -> tuple[ColumnElement[bool], ...]:
    """Return what is true of the jobs that are not at their end and read one of the files."""
    return (
        or_(Job.training_file_id.in_(file_ids), Job.validation_file_id.in_(file_ids)),
        Job.status.not_in(TERMINAL_STATUSES),
    )


def _mark_deleted(session: Session, row: File) -> None:
    row.deleted_at = func.now()
    session.flush()
    # A job lists only results that can be fetched.
    session.execute(update(Job).where(Job.result_file_id == row.id).values(result_file_id=None))


def delete_expired(session: Session, *, limit: int) -> list[str]:
    """Delete files that have expired, as their users would; one that an unfinished job reads waits for it."""
    is_read = select(Job.id).where(*_reads_one_of([File.id])).exists()
    expired = session.scalars(
        select(File)
        .where(File.expires_at <= func.now(), File.deleted_at.is_(None), ~is_read)
        .order_by(File.expires_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    deleted = []
    for row in expired:
        # Asked again under the lock: a job that was being made held it, and is seen only now.
        if session.scalar(select(Job.id).where(*_reads_one_of([row.id])).limit(1)) is None:
            _mark_deleted(session, row)
            deleted.append(row.id)
    return deleted


def list_known(session: Session, file_ids: Collection[str]) -> set[str]:
    """Return those of some ids that have a row, deleted or not."""
    return set(session.scalars(select(File.id).where(File.id.in_(file_ids))))
