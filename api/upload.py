"""Receiving a file: parsed, hashed, checked and stored as it arrives, with the memory of a few chunks."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import PurePosixPath

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.multipart import FieldPart, FileBegin, FileBytes, FileEnd, read_form
from api.schemas.files import KNOWN_PURPOSES
from luthier.core.errors import (
    InvalidRequestError,
    InvalidValueError,
    LuthierError,
    MissingParameterError,
    TooLargeError,
    UnsupportedValueError,
)
from luthier.core.settings import Settings
from luthier.data.validate import FileChecker, FileFacts
from luthier.storage.store import Sink, Storage
from services.files import StoredFile

_BLOCK_BYTES = 512 * 1024
# A client reads the answer only after it has sent its body: what is refused is still taken, and thrown
# away, for this long.
_DISCARD_SECONDS = 5.0
_MAX_FILENAME_CHARACTERS = 255


class _Incoming:
    """A file on its way into storage, written and checked in blocks."""

    def __init__(self, sink: Sink, storage: Storage, settings: Settings) -> None:
        self._sink = sink
        self._storage = storage
        self._checker = FileChecker(
            max_line_bytes=settings.max_line_bytes,
            max_expanded_bytes=settings.max_expanded_bytes,
            max_expansion_ratio=settings.max_expansion_ratio,
        )
        self._block = bytearray()
        self._num_bytes = 0
        self._max_bytes = settings.max_upload_bytes

    async def write(self, content: bytes) -> None:
        self._num_bytes += len(content)
        if self._num_bytes > self._max_bytes:
            raise _too_large(self._max_bytes)
        self._block += content
        if len(self._block) >= _BLOCK_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        block, self._block = bytes(self._block), bytearray()
        # The check runs in a thread: a large file must not hold up the other requests.
        await run_in_threadpool(self._checker.feed, block)
        await self._sink.write(block)

    async def finish(self, *, file_id: str, filename: str, purpose: str) -> StoredFile:
        await self._flush()
        if self._checker.needs_file:
            # Parquet is read from its end, so its bytes go first; what is refused is deleted again.
            await self._sink.close()
            facts = await run_in_threadpool(self._finish_stored)
        else:
            facts = await run_in_threadpool(self._checker.finish)
            await self._sink.close()
        return StoredFile(
            id=file_id,
            filename=filename,
            purpose=purpose,
            num_bytes=facts.num_bytes,
            num_rows=facts.num_rows,
            sha256=facts.sha256,
            storage_key=self._sink.key,
        )

    def _finish_stored(self) -> FileFacts:
        with self._storage.local_file(self._sink.key) as path:
            return self._checker.finish(path)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"The upload is larger than the limit of {max_bytes} bytes; split the file, or ask the operator to "
        "raise LUTHIER_MAX_UPLOAD_BYTES.",
        param="file",
    )


def _check_purpose(purpose: str | None) -> str:
    if purpose is None:
        raise MissingParameterError("Missing required parameter: 'purpose'.", param="purpose")
    if purpose not in KNOWN_PURPOSES:
        raise InvalidValueError(f"purpose: {purpose[:40]!r} is unknown; use 'fine-tune'.", param="purpose")
    if purpose != "fine-tune":
        raise UnsupportedValueError(f"purpose: '{purpose}' is not offered; use 'fine-tune'.", param="purpose")
    return purpose


def _clean_filename(name: str) -> str:
    """Return the last part of a client's file name, without control characters."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(c for c in last if c.isprintable())[:_MAX_FILENAME_CHARACTERS] or "upload"


async def _read_parts(request: Request, incoming: _Incoming, chunks: AsyncIterator[bytes]) -> tuple[str, str]:
    """Feed the form into `incoming`; return its file's name and purpose."""
    fields: dict[str, str] = {}
    filename: str | None = None
    is_our_file = False
    async for part in read_form(request.headers.get("content-type", ""), chunks):
        match part:
            case FileBegin(name, given):
                if name != "file" or filename is not None:
                    raise InvalidRequestError("Send exactly one file, in the field 'file'.", param="file")
                is_our_file, filename = True, _clean_filename(given)
            case FileBytes(content):
                if is_our_file:
                    await incoming.write(content)
            case FileEnd():
                is_our_file = False
            case FieldPart(name, value):
                if name == "purpose":
                    _check_purpose(value)
                elif name.startswith("expires_after"):
                    raise UnsupportedValueError(
                        "expires_after is not offered yet; delete the file when it is no longer needed.",
                        param="expires_after",
                    )
                fields[name] = value
    purpose = _check_purpose(fields.get("purpose"))
    if filename is None:
        raise MissingParameterError("Missing required parameter: 'file'.", param="file")
    return filename, purpose


async def _discard(chunks: AsyncIterator[bytes]) -> None:
    deadline = time.monotonic() + _DISCARD_SECONDS
    try:
        async for _ in chunks:
            if time.monotonic() > deadline:
                return
    except ClientDisconnect:
        return


async def receive_file(
    request: Request, storage: Storage, settings: Settings, *, file_id: str, storage_key: str
) -> StoredFile:
    """Take an upload into storage, whole and checked, or leave nothing of it.

    Args:
        request: the POST, its body not yet read.
        storage: where the bytes go.
        settings: the limits.
        file_id: the id the file will have.
        storage_key: the key its bytes will have.

    Returns:
        What is now durable in storage.

    Raises:
        LuthierError: when the form, the purpose, the size or a line of the file breaks a rule.
    """
    # One iterator for parsing and discarding: a body can be asked for only once.
    chunks = request.stream()
    declared = request.headers.get("content-length", "")
    try:
        if declared.isdecimal() and int(declared) > settings.max_upload_bytes:
            raise _too_large(settings.max_upload_bytes)
        sink = storage.open_sink(storage_key)
        try:
            incoming = _Incoming(sink, storage, settings)
            filename, purpose = await _read_parts(request, incoming, chunks)
            return await incoming.finish(file_id=file_id, filename=filename, purpose=purpose)
        except BaseException:
            # Shielded: a client that leaves cancels this request, and its bytes must go all the same.
            await asyncio.shield(sink.abort())
            raise
    except LuthierError:
        await _discard(chunks)
        raise
