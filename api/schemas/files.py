"""Files, uploads in parts, and the report of a file."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from api.schemas.base import Body
from api.uploads.content_disposition import clean_filename
from api.uploads.file_upload import MAX_EXPIRES_AFTER_SECONDS, MIN_EXPIRES_AFTER_SECONDS
from db.tables import File, Upload, UploadPart
from luthier.core.errors import InvalidValueError
from luthier.core.specs import BaseFacts
from luthier.data.readers.upload_check import check_input_purpose, check_mime_type
from luthier.data.reports.file_report import DataReport
from services.files.uploads import MAX_PARTS, NewUpload


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
    """Return a file as clients see it; `status` is `processed`: a stored file has been checked."""
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


class ExpiresAfterBody(Body):
    """When the file that an upload makes expires, counted from its creation."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRES_AFTER_SECONDS, le=MAX_EXPIRES_AFTER_SECONDS, strict=True)


class CreateUploadBody(Body):
    """Body of POST /v1/uploads. An explicit null means unset."""

    bytes: int = Field(ge=1, strict=True)
    filename: str = Field(min_length=1, max_length=4096)
    mime_type: str = Field(min_length=1, max_length=255)
    purpose: str = Field(min_length=1, max_length=64)
    expires_after: ExpiresAfterBody | None = None

    def to_new_upload(self, max_bytes: int) -> NewUpload:
        """Check and translate the body.

        Raises:
            InvalidValueError: when the file is larger than `max_bytes`, or purpose, type or name is invalid.
            UnsupportedValueError: when the purpose is reserved for the service.
        """
        check_input_purpose(self.purpose)
        check_mime_type(self.mime_type, self.purpose)
        if self.bytes > max_bytes:
            raise InvalidValueError(
                f"bytes: {self.bytes} is more than the limit of {max_bytes}; split the file, or ask the "
                "operator to raise LUTHIER_MAX_LARGE_UPLOAD_BYTES.",
                param="bytes",
            )
        return NewUpload(
            filename=clean_filename(self.filename, param="filename"),
            purpose=self.purpose,
            mime_type=self.mime_type,
            num_bytes=self.bytes,
            file_expires_after_seconds=None if self.expires_after is None else self.expires_after.seconds,
        )


class CompleteUploadBody(Body):
    """Body of POST /v1/uploads/{id}/complete: the parts in the file's order, and the file's MD5."""

    part_ids: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=1, max_length=MAX_PARTS
    )
    md5: Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f]{32}$", to_lower=True)] | None = None


class UploadObject(TypedDict):
    """A file that is sent in parts."""

    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileObject | None


class UploadPartObject(TypedDict):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


def upload_object(upload: Upload, file: File | None = None) -> UploadObject:
    """Return an upload as clients see it, with the file that it made."""
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.num_bytes,
        "created_at": int(upload.created_at.timestamp()),
        "expires_at": int(upload.expires_at.timestamp()),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "file": None if file is None else file_object(file),
    }


def upload_part_object(part: UploadPart) -> UploadPartObject:
    """Return a part as clients see it."""
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": int(part.created_at.timestamp()),
        "upload_id": part.upload_id,
    }


class FileReportObject(DataReport):
    """GET /v1/files/{id}/report. Sizes in tokens; rows by line, of a JSON array and Parquet by number."""

    object: Literal["file.report"] = "file.report"
    file_id: str
    sha256: str
    base: str
    base_digest: str
    validation_file: str | None


def file_report_object(
    file_id: str, sha256: str, base: BaseFacts, validation_file_id: str | None, report: DataReport
) -> FileReportObject:
    """Return a file's report as clients see it."""
    return FileReportObject(
        file_id=file_id,
        sha256=sha256,
        base=base.id,
        base_digest=base.digest,
        validation_file=validation_file_id,
        **dict(report),
    )
