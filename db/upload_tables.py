"""The tables of uploads: large files that arrive in parts and become a file in the end."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from db.tables import Owned, Table


class Upload(Owned, Table):
    """A file that is sent in parts. Its parts, and the file's own bytes, lie under one prefix in storage.

    `status` is `pending`, `completed`, `cancelled` or `expired`; the last is written when somebody looks.
    """

    __tablename__ = "uploads"
    __table_args__ = (
        Index("ix_uploads_untidied", "status", "ended_at", postgresql_where=text("tidied_at IS NULL")),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    mime_type: Mapped[str]
    # What the client said that all parts together hold.
    num_bytes: Mapped[int]
    # When the file expires, in seconds after it is made; None: never.
    file_expires_after_seconds: Mapped[int | None]
    status: Mapped[str]
    expires_at: Mapped[datetime]
    ended_at: Mapped[datetime | None]
    # Until then its parts are being read by a complete that began in time.
    busy_until: Mapped[datetime | None]
    # What the complete that made the file named, so that the same one sent again is known.
    part_ids: Mapped[list[Any] | None] = mapped_column(JSONB(none_as_null=True))
    md5: Mapped[str | None]
    file_id: Mapped[str | None] = mapped_column(ForeignKey("files.id"))
    # When the bytes of its parts were deleted from storage.
    tidied_at: Mapped[datetime | None]


class UploadPart(Owned, Table):
    """A piece of an upload, durable under `storage_key`; its place is said when the upload is completed."""

    __tablename__ = "upload_parts"
    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    num_bytes: Mapped[int]
    storage_key: Mapped[str]
