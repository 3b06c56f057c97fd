"""The file object."""

from typing import Any

from db.tables import File

# Purposes that OpenAI's clients may send; only fine-tune has a meaning here so far.
KNOWN_PURPOSES = frozenset({"assistants", "batch", "fine-tune", "vision", "user_data", "evals"})


def file_object(file: File) -> dict[str, Any]:
    """Return a file as clients see it; `status` is `processed`, since a stored file has been checked."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": None,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
