"""Uploads: files that arrive in parts. Rows only; the bytes of parts are durable before they have one."""

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from db.queries import find_owned
from db.tables import Upload, UploadPart
from luthier.core.errors import InvalidUploadStateError, InvalidValueError, NotFoundError
from luthier.core.ids import new_id
from services.accounts.auth import Principal

LIFETIME = timedelta(hours=1)
MAX_PARTS = 10_000
# Parts may be sent anew, all of them once: when an answer was lost, or a row of them was broken.
_MAX_TIMES_DECLARED = 2


class UploadStatus(StrEnum):
    """Where an upload is in its life; all but `pending` are final."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class NewUpload:
    """What a client means to send; checked. `file_expires_after_seconds` None: the file never expires."""

    filename: str
    purpose: str
    mime_type: str
    num_bytes: int
    file_expires_after_seconds: int | None


@dataclass(frozen=True)
class StoredPart:
    """A part's bytes, durable under `storage_key`."""

    id: str
    num_bytes: int
    storage_key: str


def storage_prefix(project_id: str, upload_id: str) -> str:
    """Return where an upload's parts and its file lie: what no row names there can be tidied."""
    return f"projects/{project_id}/uploads/{upload_id}"


def create(session: Session, principal: Principal, new: NewUpload) -> Upload:
    """Make an upload that waits for its parts for an hour."""
    row = Upload(
        id=new_id("upload"),
        **principal.columns(),
        **vars(new),
        status=UploadStatus.PENDING.value,
        expires_at=func.now() + LIFETIME,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def _has_lapsed() -> ColumnElement[bool]:
    """Whether a pending upload's time is over; a complete that is at work puts it off."""
    return and_(
        Upload.status == UploadStatus.PENDING.value,
        Upload.expires_at <= func.now(),
        or_(Upload.busy_until.is_(None), Upload.busy_until <= func.now()),
    )


def get(session: Session, principal: Principal, upload_id: str) -> Upload:
    """Return an upload of the project, locked until the transaction ends; what has lapsed is now expired."""
    row = find_owned(session, Upload, principal.project_id, upload_id, for_update=True)
    if row is None:
        raise NotFoundError(f"No such Upload object: {upload_id[:64]}", param="id")
    if session.scalar(select(_has_lapsed()).where(Upload.id == upload_id)):
        row.status, row.ended_at = UploadStatus.EXPIRED.value, func.now()
        session.flush()
    return row


def get_open(session: Session, principal: Principal, upload_id: str) -> Upload:
    """Return an upload that still takes parts, locked until the transaction ends.

    Raises:
        InvalidUploadStateError: when it is at its end, or its time is over.
    """
    row = get(session, principal, upload_id)
    check_pending(row)
    if session.scalar(select(Upload.expires_at <= func.now()).where(Upload.id == upload_id)):
        raise _not_pending(upload_id, UploadStatus.EXPIRED)
    return row


def check_pending(row: Upload) -> None:
    """Refuse what only a pending upload allows.

    Raises:
        InvalidUploadStateError: when it is at its end.
    """
    if row.status != UploadStatus.PENDING.value:
        raise _not_pending(row.id, UploadStatus(row.status))


def _not_pending(upload_id: str, status: UploadStatus) -> InvalidUploadStateError:
    return InvalidUploadStateError(
        f"{upload_id} is {status.value}, and only a pending upload allows that; make a new one with "
        "POST /v1/uploads.",
        param="id",
    )


def record_part(session: Session, principal: Principal, upload_id: str, stored: StoredPart) -> UploadPart:
    """Make a part of an upload exist.

    Raises:
        InvalidUploadStateError: when it takes no more parts.
        InvalidValueError: when its parts would hold far more than was declared, or are too many.
    """
    upload = get_open(session, principal, upload_id)
    # Counted under the upload's lock: parts that come at the same time pass here one after the other.
    num_parts, num_bytes = session.execute(
        select(func.count(), func.coalesce(func.sum(UploadPart.num_bytes), 0)).where(
            UploadPart.upload_id == upload_id
        )
    ).one()
    if stored.num_bytes > upload.num_bytes or (
        num_bytes + stored.num_bytes > _MAX_TIMES_DECLARED * upload.num_bytes
    ):
        raise InvalidValueError(
            f"data: the upload was created for {upload.num_bytes} bytes, and its parts hold {num_bytes} "
            f"without this one of {stored.num_bytes}; at most {_MAX_TIMES_DECLARED} times what was declared "
            "is kept.",
            param="data",
        )
    if num_parts >= MAX_PARTS:
        raise InvalidValueError(f"data: an upload has at most {MAX_PARTS} parts.", param="data")
    row = UploadPart(**principal.columns(), upload_id=upload_id, **vars(stored))
    session.add(row)
    session.flush()
    session.refresh(row)
    return row


def cancel(session: Session, principal: Principal, upload_id: str) -> tuple[Upload, list[str]]:
    """End an upload for which nothing more is to come.

    Raises:
        InvalidUploadStateError: when it is at its end already.
    """
    row = get(session, principal, upload_id)
    check_pending(row)
    row.status, row.ended_at = UploadStatus.CANCELLED.value, func.now()
    session.flush()
    keys = session.scalars(select(UploadPart.storage_key).where(UploadPart.upload_id == upload_id)).all()
    return row, list(keys)


def expire_lapsed(session: Session) -> None:
    """End every upload whose time is over."""
    session.execute(
        update(Upload)
        .where(_has_lapsed())
        .values(status=UploadStatus.EXPIRED.value, ended_at=func.now())
        .execution_options(synchronize_session=False)
    )
