"""AppState of an upload: taken into storage one by one, and put together into a file that is checked."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from fastapi import Request

from api.uploads.multipart import FieldPart, FileBegin, FileBytes, FileEnd, read_form
from api.uploads.object_writer import Incoming, StoredBytes, receiving
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
# A form with one part has this much around it at most.
_MAX_FORM_BYTES = 64 * 1024


def _too_large() -> InvalidValueError:
    return InvalidValueError(
        f"data: a part has at most {MAX_PART_BYTES} bytes (64 MiB); cut the file into more parts.",
        param="data",
    )


async def _read_data(incoming: Incoming, content_type: str, chunks: AsyncIterator[bytes]) -> None:
    """Read a form whose only field is the part's bytes."""
    has_begun = False
    async for piece in read_form(content_type, chunks, fields="the part's bytes in the field 'data'"):
        match piece:
            case FileBegin(name, _):
                if name != "data" or has_begun:
                    raise InvalidRequestError("Send exactly one part, in the field 'data'.", param="data")
                has_begun = True
            case FileBytes(content):
                await incoming.write(content)
            case FileEnd():
                pass
            case FieldPart(name, _):
                raise InvalidRequestError(
                    f"{name[:40]}: send the part's bytes as a file, in the field 'data', and nothing else.",
                    param=name[:40],
                )
    if not has_begun:
        raise MissingParameterError("Missing required parameter: 'data'.", param="data")
    if incoming.num_bytes == 0:
        raise InvalidValueError("data: the part is empty.", param="data")


async def receive_part(request: Request, storage: Storage, *, part_id: str, storage_key: str) -> StoredPart:
    """Take a part into storage, or leave nothing of it.

    Args:
        request: the POST, its body not yet read.
        storage: where the bytes go.
        storage_key: the key its bytes will have.

    Returns:
        What is now durable in storage.

    Raises:
        LuthierError: when the form or the size breaks a rule.
    """
    async with receiving(
        request,
        storage,
        storage_key,
        max_bytes=MAX_PART_BYTES,
        max_body_bytes=MAX_PART_BYTES + _MAX_FORM_BYTES,
        too_large=_too_large(),
    ) as (incoming, chunks):
        await _read_data(incoming, request.headers.get("content-type", ""), chunks)
        await incoming.close()
    return StoredPart(part_id, incoming.num_bytes, storage_key)


async def assemble(
    storage: Storage, parts: Sequence[StoredPart], *, check: UploadCheck, md5: str | None, storage_key: str
) -> StoredBytes:
    """Put parts together into one object, checked while they stream by; or leave nothing of it.

    Args:
        storage: where the parts are, and where the object goes.
        check: what the whole is judged by.
        md5: what the whole must hash to, 32 hex digits, or None.

    Returns:
        What the check found, and the hash.

    Raises:
        InvalidFileFormatError: when the whole breaks the rules of the check.
        InvalidValueError: when it hashes to something else than `md5`.
        ArtifactCorruptError: when a part is not there.
    """
    num_bytes = sum(part.num_bytes for part in parts)
    incoming = Incoming(storage, storage_key, max_bytes=num_bytes, too_large=_too_large())
    if md5 is not None:
        check.require_md5(md5)
    incoming.begin_check(check)
    try:
        for part in parts:
            async for chunk in storage.stream(part.storage_key, start=0, end=part.num_bytes):
                await incoming.write(chunk)
        facts = await incoming.finish()
    except InvalidFileFormatError as fault:
        await asyncio.shield(incoming.abort())
        # The request has no field of that name: what is at fault are the parts, or their order.
        raise InvalidFileFormatError(fault.message, param="part_ids") from fault
    except BaseException:
        await asyncio.shield(incoming.abort())
        raise
    return facts
