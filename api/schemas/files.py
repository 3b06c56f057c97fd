"""The file object."""

from typing import Any

from db.tables import File


def file_object(file: File) -> dict[str, Any]:
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
