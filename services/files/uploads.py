"""Uploads: files that arrive in parts and become a file. A part's bytes are durable before its row."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session

from db.queries import find_owned
from db.tables import File, Upload, UploadPart
from luthier.core.errors import InvalidUploadStateError, InvalidValueError, NotFoundError
from luthier.core.ids import new_id
from services.accounts.auth import Principal
from services.files import files
from services.files.files import StoredFile

LIFETIME = timedelta(hours=1)
MAX_PARTS = 10_000
# Parts may be sent anew, all of them once: when an answer was lost, or a row of them was broken.
_MAX_TIMES_DECLARED = 2
# A complete that began in time may read its parts for this long after the upload would have expired.
_MAX_COMPLETING = timedelta(minutes=15)


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
    """Return the storage prefix of an upload's parts and its file; objects without a row are garbage."""
    return f"projects/{project_id}/uploads/{upload_id}"


def create(session: Session, principal: Principal, new: NewUpload) -> Upload:
    """Make an upload that waits for its parts for an hour."""
    row = Upload(
        id=new_id("upload"),
        **principal.owner_columns(),
        **vars(new),
        status=UploadStatus.PENDING.value,
        expires_at=func.now() + LIFETIME,
    )
    session.add(row)
    session.flush()
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
    return row


def get_open(session: Session, principal: Principal, upload_id: str) -> Upload:
    """Return an upload that still takes parts, locked until the transaction ends."""
    row = get(session, principal, upload_id)
    check_pending(row)
    if session.scalar(select(Upload.expires_at <= func.now()).where(Upload.id == upload_id)):
        raise _not_pending(upload_id, UploadStatus.EXPIRED)
    return row


def check_pending(row: Upload) -> None:
    """Refuse what only a pending upload allows."""
    if row.status != UploadStatus.PENDING.value:
        raise _not_pending(row.id, UploadStatus(row.status))


def _not_pending(upload_id: str, status: UploadStatus) -> InvalidUploadStateError:
    return InvalidUploadStateError(
        f"{upload_id} is {status.value}, and only a pending upload allows that; make a new one with "
        "POST /v1/uploads.",
        param="id",
    )


def record_part(session: Session, principal: Principal, upload_id: str, stored: StoredPart) -> UploadPart:
    """Make a part of an upload exist, within the number of parts and bytes that the upload allows."""
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
    row = UploadPart(**principal.owner_columns(), upload_id=upload_id, **vars(stored))
    session.add(row)
    session.flush()
    return row


def cancel(session: Session, principal: Principal, upload_id: str) -> tuple[Upload, list[str]]:
    """End a pending upload; return it with the storage keys of its parts."""
    row = get(session, principal, upload_id)
    check_pending(row)
    row.status, row.ended_at = UploadStatus.CANCELLED.value, func.now()
    keys = session.scalars(select(UploadPart.storage_key).where(UploadPart.upload_id == upload_id)).all()
    return row, list(keys)


def expire_lapsed(session: Session) -> None:
    """End every upload whose time is over."""
    session.execute(
        update(Upload).where(_has_lapsed()).values(status=UploadStatus.EXPIRED.value, ended_at=func.now())
    )


@dataclass(frozen=True)
class Assembly:
    """The parts that a complete assembles; none when the same complete was done before."""

    upload: Upload
    parts: tuple[UploadPart, ...]
    is_done: bool
    file: File | None


def start_completing(
    session: Session, principal: Principal, upload_id: str, *, part_ids: Sequence[str], md5: str | None
) -> Assembly:
    """Return the parts that a complete has to assemble, and keep them from being collected meanwhile.

    Args:
        md5: what the whole must hash to, 32 hex digits, or None.

    Returns:
        The parts; or what came of it, when the same complete was done before.

    Raises:
        InvalidUploadStateError: when it is at its end in another way, or its time is over.
        InvalidValueError: when a part is unknown or named twice, or the sizes do not add up.
    """
    row = get(session, principal, upload_id)
    if row.status == UploadStatus.COMPLETED.value and _is_same_complete(row, part_ids, md5):
        return Assembly(row, (), is_done=True, file=find_file(session, row))
    row = get_open(session, principal, upload_id)
    parts = session.scalars(select(UploadPart).where(UploadPart.upload_id == upload_id))
    found = {part.id: part for part in parts}
    _check_parts(row, part_ids, found)
    row.busy_until = func.now() + _MAX_COMPLETING
    return Assembly(row, tuple(found[part_id] for part_id in part_ids), is_done=False, file=None)


def _is_same_complete(row: Upload, part_ids: Sequence[str], md5: str | None) -> bool:
    return row.part_ids == list(part_ids) and md5 in (None, row.md5)


def _check_parts(row: Upload, part_ids: Sequence[str], found: dict[str, UploadPart]) -> None:
    for place, part_id in enumerate(part_ids):
        if part_id not in found:
            raise InvalidValueError(
                f"part_ids: {part_id[:64]} is no part of {row.id}; send the ids that POST …/parts answered.",
                param=f"part_ids.{place}",
            )
    if len(set(part_ids)) < len(part_ids):
        raise InvalidValueError("part_ids: a part is named twice; name each once.", param="part_ids")
    num_bytes = sum(found[part_id].num_bytes for part_id in part_ids)
    if num_bytes != row.num_bytes:
        raise InvalidValueError(
            f"part_ids: these parts hold {num_bytes} bytes, and the upload was created for {row.num_bytes}; "
            "name all its parts, or make a new upload with the right size.",
            param="part_ids",
        )


def find_file(session: Session, row: Upload) -> File | None:
    """Return the file that came of an upload, unless it has been deleted or has expired since."""
    if row.file_id is None:
        return None
    return session.scalar(
        select(File).where(File.id == row.file_id, File.deleted_at.is_(None), files.is_unexpired())
    )


def finish_completing(
    session: Session,
    principal: Principal,
    upload_id: str,
    stored: StoredFile,
    *,
    part_ids: Sequence[str],
    md5: str | None,
) -> tuple[Upload, File | None]:
    """Make the file of an upload exist, and the upload completed.

    The file is another one than `stored` when a duplicate of this request was faster; then the bytes of
    `stored` are not needed.
    """
    row = get(session, principal, upload_id)
    if row.status == UploadStatus.COMPLETED.value and _is_same_complete(row, part_ids, md5):
        return row, find_file(session, row)
    check_pending(row)
    file = files.record(session, principal, stored)
    row.status, row.ended_at = UploadStatus.COMPLETED.value, func.now()
    row.part_ids, row.md5, row.file_id = list(part_ids), md5, file.id
    return row, file
