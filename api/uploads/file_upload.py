"""Receives a file: parsed, hashed, checked and stored as it arrives, in the memory of a few chunks."""

import re
from collections.abc import AsyncIterator

from fastapi import Request

from api.uploads.content_disposition import clean_filename
from api.uploads.multipart import FieldPart, FileBegin, FileBytes, read_form
from api.uploads.object_writer import ObjectWriter, receiving
from luthier.core.errors import (
    InvalidRequestError,
    InvalidTypeError,
    InvalidValueError,
    MissingParameterError,
    TooLargeError,
    UnknownParameterError,
)
from luthier.core.settings import Settings
from luthier.data.readers.base import Limits
from luthier.data.readers.upload_check import (
    TakePlace,
    UploadCheck,
    check_input_purpose,
    row_limits,
)
from luthier.storage.store import Storage
from services.files.files import StoredFile

MIN_EXPIRES_AFTER_SECONDS, MAX_EXPIRES_AFTER_SECONDS = 3600, 30 * 24 * 3600

_ANCHOR, _SECONDS = "expires_after[anchor]", "expires_after[seconds]"
_FIELDS = ("purpose", _ANCHOR, _SECONDS)


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(
        f"The upload is larger than the limit of {max_bytes} bytes; send it in parts (POST /v1/uploads), "
        "split the file, or ask the operator to raise LUTHIER_MAX_UPLOAD_BYTES.",
        param="file",
    )


def read_expires_after(fields: dict[str, str]) -> int | None:
    """Return after how many seconds a file is to expire, or None when the form does not say.

    Raises:
        InvalidRequestError: when one of the two fields is missing or invalid; names it with its bracket.
    """
    if _ANCHOR not in fields and _SECONDS not in fields:
        return None
    for name in (_ANCHOR, _SECONDS):
        if name not in fields:
            raise MissingParameterError(
                f"Missing required parameter: '{name}'. Send both fields of expires_after, or none.",
                param=name,
            )
    if fields[_ANCHOR] != "created_at":
        raise InvalidValueError(f"{_ANCHOR}: the only anchor is 'created_at'.", param=_ANCHOR)
    text = fields[_SECONDS].strip()
    if re.fullmatch(r"[+-]?[0-9]{1,18}", text) is None:
        raise InvalidTypeError(f"{_SECONDS}: write a whole number of seconds.", param=_SECONDS)
    if not MIN_EXPIRES_AFTER_SECONDS <= int(text) <= MAX_EXPIRES_AFTER_SECONDS:
        raise InvalidValueError(
            f"{_SECONDS}: {int(text)} is not from {MIN_EXPIRES_AFTER_SECONDS} (an hour) to "
            f"{MAX_EXPIRES_AFTER_SECONDS} (30 days).",
            param=_SECONDS,
        )
    return int(text)


class _Form:
    """The form of an upload while it is read: its fields, and the file that is being stored."""

    def __init__(self, writer: ObjectWriter, limits: Limits, take_place: TakePlace) -> None:
        self._writer = writer
        self._fields: dict[str, str] = {}
        self._filename: str | None = None
        self._limits, self._take_place = limits, take_place
        self._undecided: UploadCheck | None = None

    def _begin_file(self, name: str, filename: str) -> None:
        if name != "file" or self._filename is not None:
            raise InvalidRequestError("Send exactly one file, in the field 'file'.", param="file")
        self._filename = clean_filename(filename, param="file")
        purpose = self._fields.get("purpose")
        if purpose is not None:
            self._writer.begin_check(UploadCheck(purpose, self._limits, self._take_place))
            return
        # Clients may send the purpose last; until then a fault of the rows is kept and not raised.
        self._undecided = UploadCheck(None, self._limits, self._take_place)
        self._writer.begin_check(self._undecided)

    def _take_field(self, name: str, value: str) -> None:
        if name == "file":
            raise InvalidRequestError(
                "file: the field has no file name, so it is no file; send it as one.", param="file"
            )
        if name not in _FIELDS:
            raise UnknownParameterError(f"Unknown parameter: '{name[:40]}'. Leave it out.", param=name[:40])
        if name in self._fields:
            raise InvalidRequestError(f"{name}: the form has this field twice; send it once.", param=name)
        if name == "purpose":
            check_input_purpose(value)
            if self._undecided is not None:
                self._undecided.decide(value)
        self._fields[name] = value
        if _ANCHOR in self._fields and _SECONDS in self._fields:
            # Before the gigabytes that may follow.
            read_expires_after(self._fields)

    async def read(self, content_type: str, chunks: AsyncIterator[bytes]) -> None:
        async for part in read_form(content_type, chunks, fields="the fields 'purpose' and 'file'"):
            match part:
                case FileBegin(name, filename):
                    self._begin_file(name, filename)
                case FileBytes(content):
                    await self._writer.write(content)
                case FieldPart(name, value):
                    self._take_field(name, value)

    async def store(self, *, file_id: str, storage_key: str) -> StoredFile:
        """Check the form as a whole, and commit its file."""
        expires_after_seconds = read_expires_after(self._fields)
        if "purpose" not in self._fields:
            raise MissingParameterError("Missing required parameter: 'purpose'.", param="purpose")
        if self._filename is None:
            raise MissingParameterError("Missing required parameter: 'file'.", param="file")
        facts = await self._writer.finish()
        return StoredFile(
            id=file_id,
            filename=self._filename,
            purpose=self._fields["purpose"],
            storage_key=storage_key,
            expires_after_seconds=expires_after_seconds,
            **facts._asdict(),
        )


async def receive_file(
    request: Request,
    storage: Storage,
    settings: Settings,
    take_place: TakePlace,
    *,
    file_id: str,
    storage_key: str,
) -> StoredFile:
    """Store an upload checked and durably, or nothing of it.

    Raises:
        LuthierError: when the form, the purpose, the size or a line of the file breaks a rule.
    """
    max_bytes = settings.max_upload_bytes
    async with receiving(
        request,
        storage,
        storage_key,
        max_bytes=max_bytes,
        max_body_bytes=max_bytes,
        too_large=_too_large(max_bytes),
    ) as (writer, chunks):
        form = _Form(writer, row_limits(settings), take_place)
        await form.read(request.headers.get("content-type", ""), chunks)
        return await form.store(file_id=file_id, storage_key=storage_key)
