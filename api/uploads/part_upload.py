"""Parts of an upload: received one by one, and assembled into a checked file."""

from collections.abc import AsyncIterator, Sequence

from fastapi import Request

from api.uploads.multipart import FieldPart, FileBegin, FileBytes, read_form
from api.uploads.object_writer import ObjectWriter, StoredBytes, receiving, writing
from db.tables import UploadPart
from luthier.core.errors import (
    InvalidFileFormatError,
    InvalidRequestError,
    InvalidValueError,
    MissingParameterError,
)
from luthier.core.settings import MIB
from luthier.data.readers.upload_check import UploadCheck
from luthier.storage.store import Storage
from services.files.uploads import StoredPart

# The SDKs cut files into parts of exactly this size.
MAX_PART_BYTES = 64 * MIB
# The largest overhead of a form around one part.
_MAX_FORM_BYTES = 64 * 1024


def _too_large() -> InvalidValueError:
    return InvalidValueError(
        f"data: a part has at most {MAX_PART_BYTES} bytes (64 MiB); cut the file into more parts.",
        param="data",
    )


async def _read_data(writer: ObjectWriter, content_type: str, chunks: AsyncIterator[bytes]) -> None:
    """Read a form whose only field is the part's bytes."""
    has_begun = False
    async for piece in read_form(content_type, chunks, fields="the part's bytes in the field 'data'"):
        match piece:
            case FileBegin(name, _):
                if name != "data" or has_begun:
                    raise InvalidRequestError("Send exactly one part, in the field 'data'.", param="data")
                has_begun = True
            case FileBytes(content):
                await writer.write(content)
            case FieldPart(name, _):
                raise InvalidRequestError(
                    f"{name[:40]}: send the part's bytes as a file, in the field 'data', and nothing else.",
                    param=name[:40],
                )
    if not has_begun:
        raise MissingParameterError("Missing required parameter: 'data'.", param="data")
    if writer.num_bytes == 0:
        raise InvalidValueError("data: the part is empty.", param="data")


async def receive_part(request: Request, storage: Storage, *, part_id: str, storage_key: str) -> StoredPart:
    """Store a part durably, or nothing of it. Raises LuthierError when the form or the size breaks a rule."""
    async with receiving(
        request,
        storage,
        storage_key,
        max_bytes=MAX_PART_BYTES,
        max_body_bytes=MAX_PART_BYTES + _MAX_FORM_BYTES,
        too_large=_too_large(),
    ) as (writer, chunks):
        await _read_data(writer, request.headers.get("content-type", ""), chunks)
        await writer.close()
    return StoredPart(part_id, writer.num_bytes, storage_key)


async def assemble(
    storage: Storage,
    parts: Sequence[StoredPart | UploadPart],
    *,
    check: UploadCheck,
    md5: str | None,
    storage_key: str,
) -> StoredBytes:
    """Join parts into one object, checked while they stream by; when that fails, nothing is stored.

    Args:
        md5: the expected MD5 in 32 hex digits, or None.

    Raises:
        InvalidFileFormatError: when the file breaks a rule of the check.
        InvalidValueError: when its MD5 is not `md5`.
        ArtifactCorruptError: when a part is missing in storage.
    """
    num_bytes = sum(part.num_bytes for part in parts)
    if md5 is not None:
        check.require_md5(md5)
    try:
        async with writing(storage, storage_key, max_bytes=num_bytes, too_large=_too_large()) as writer:
            writer.begin_check(check)
            for part in parts:
                async for chunk in storage.stream(part.storage_key, start=0, end=part.num_bytes):
                    await writer.write(chunk)
            return await writer.finish()
    except InvalidFileFormatError as fault:
        # The request has no field `file`: the parts or their order are at fault.
        raise InvalidFileFormatError(fault.message, param="part_ids") from fault
