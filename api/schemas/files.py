"""Files, uploads in parts, and the report of a file."""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints

from api.schemas.base import Answer, Body, Timestamp
from api.uploads.content_disposition import clean_filename
from api.uploads.file_upload import MAX_EXPIRES_AFTER_SECONDS, MIN_EXPIRES_AFTER_SECONDS
from db.tables import File, Upload
from luthier.core.errors import InvalidValueError
from luthier.data.readers.upload_check import check_input_purpose, check_mime_type
from luthier.data.reports.file_report import DataReport
from services.files.uploads import MAX_PARTS, NewUpload


class FileObject(Answer):
    """A stored file; its status is `processed`: it has been checked."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(validation_alias="num_bytes")
    created_at: Timestamp
    expires_at: Timestamp | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    status_details: None = None


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


class UploadObject(Answer):
    """A file that is sent in parts, and the file that it made."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int = Field(validation_alias="num_bytes")
    created_at: Timestamp
    expires_at: Timestamp
    filename: str
    purpose: str
    status: str
    file: FileObject | None = None

    @classmethod
    def of_upload(cls, upload: Upload, file: File | None = None) -> Self:
        """Return an upload as clients see it."""
        return cls.of(upload, file=None if file is None else FileObject.of(file))


class UploadPartObject(Answer):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: Timestamp
    upload_id: str


class FileReportObject(DataReport):
    """GET /v1/files/{id}/report. Sizes in tokens; rows by line, of a JSON array and Parquet by number."""

    object: Literal["file.report"] = "file.report"
    file_id: str
    sha256: str
    base: str
    base_digest: str
    validation_file: str | None
