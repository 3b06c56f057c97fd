"""The file object."""

from typing import Literal

from typing_extensions import TypedDict

from db.tables import File


class FileObject(TypedDict):
    """A stored file."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]
    status_details: None


def file_object(file: File) -> FileObject:
    """Return a file as clients see it; `status` is `processed`, since a stored file has been checked."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": None if file.expires_at is None else int(file.expires_at.timestamp()),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
