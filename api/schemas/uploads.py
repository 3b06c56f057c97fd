"""What clients say of uploads and hear of them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from api.schemas.files import FileObject, file_object
from api.uploads.content_disposition import clean_filename
from api.uploads.file_upload import MAX_EXPIRES_AFTER_SECONDS, MIN_EXPIRES_AFTER_SECONDS
from db.tables import File, Upload, UploadPart
from luthier.core.errors import InvalidValueError
from luthier.data.readers.upload_check import check_input_purpose, check_mime_type
from services.files.uploads import MAX_PARTS, NewUpload


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExpiresAfterBody(_Body):
    """When the file that comes of an upload expires, from its creation on."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_EXPIRES_AFTER_SECONDS, le=MAX_EXPIRES_AFTER_SECONDS, strict=True)


class CreateUploadBody(_Body):
    """Body of POST /v1/uploads. An explicit null means unset."""

    bytes: int = Field(ge=1, strict=True)
    filename: str = Field(min_length=1, max_length=4096)
    mime_type: str = Field(min_length=1, max_length=255)
    purpose: str = Field(min_length=1, max_length=64)
    expires_after: ExpiresAfterBody | None = None

    def to_new_upload(self, max_bytes: int) -> NewUpload:
        """Check and translate the body.

        Args:
            max_bytes: the largest file that may be sent in parts.

        Raises:
            InvalidValueError: when the file is too large, or its purpose, type or name is no good.
            UnsupportedValueError: when the purpose is one that the service keeps to itself.
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


class CompleteUploadBody(_Body):
    """Body of POST /v1/uploads/{id}/complete: the parts in the file's order, and what it should hash to."""

    part_ids: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        min_length=1, max_length=MAX_PARTS
    )
    md5: Annotated[str, Field(pattern=r"^[0-9A-Fa-f]{32}$")] | None = None


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
    """Return an upload as clients see it, with the file that came of it."""
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
