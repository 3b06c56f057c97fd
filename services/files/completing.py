"""Completing an upload: its parts become a file. Between the two steps here the bytes are put together."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.tables import File, Upload, UploadPart
from luthier.core.errors import InvalidValueError
from services.accounts.auth import Principal
from services.files import files, uploads
from services.files.files import StoredFile
from services.files.uploads import StoredPart, UploadStatus

# A complete that began in time may read its parts for this long after the upload would have expired.
_MAX_COMPLETING = timedelta(minutes=15)


@dataclass(frozen=True)
class Assembly:
    """What a complete is to do: put these parts together; or nothing, when it was done before."""

    upload: Upload
    parts: tuple[StoredPart, ...]
    is_done: bool
    file: File | None


def start(
    session: Session, principal: Principal, upload_id: str, *, part_ids: Sequence[str], md5: str | None
) -> Assembly:
    """Say what a complete has to put together, and keep the parts from being tidied meanwhile.

    Args:
        md5: what the whole must hash to, 32 hex digits, or None.

    Returns:
        The parts; or what came of it, when the same complete was done before.

    Raises:
        InvalidUploadStateError: when it is at its end in another way, or its time is over.
        InvalidValueError: when a part is unknown or named twice, or the sizes do not add up.
    """
    row = uploads.get(session, principal, upload_id)
    if row.status == UploadStatus.COMPLETED.value and _is_same_complete(row, part_ids, md5):
        return Assembly(row, (), is_done=True, file=find_file(session, row))
    row = uploads.get_open(session, principal, upload_id)
    found = {
        part.id: StoredPart(part.id, part.num_bytes, part.storage_key)
        for part in session.scalars(select(UploadPart).where(UploadPart.upload_id == upload_id))
    }
    _check_parts(row, part_ids, found)
    row.busy_until = func.now() + _MAX_COMPLETING
    session.flush()
    session.refresh(row)
    return Assembly(row, tuple(found[part_id] for part_id in part_ids), is_done=False, file=None)


def _is_same_complete(row: Upload, part_ids: Sequence[str], md5: str | None) -> bool:
    return row.part_ids == list(part_ids) and md5 in (None, row.md5)


def _check_parts(row: Upload, part_ids: Sequence[str], found: dict[str, StoredPart]) -> None:
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


def finish(
    session: Session,
    principal: Principal,
    upload_id: str,
    stored: StoredFile,
    *,
    part_ids: Sequence[str],
    md5: str | None,
) -> tuple[Upload, File | None]:
    """Make the file of an upload exist, and the upload completed.

    Returns:
        The upload and its file. The file is another one than `stored` when a twin of this request was
        faster; then the bytes of `stored` are not needed.

    Raises:
        InvalidUploadStateError: when it has been cancelled or completed otherwise meanwhile.
    """
    row = uploads.get(session, principal, upload_id)
    if row.status == UploadStatus.COMPLETED.value and _is_same_complete(row, part_ids, md5):
        return row, find_file(session, row)
    uploads.check_pending(row)
    file = files.record(session, principal, stored)
    row.status, row.ended_at = UploadStatus.COMPLETED.value, func.now()
    row.part_ids, row.md5, row.file_id = list(part_ids), md5, file.id
    session.flush()
    return row, file
