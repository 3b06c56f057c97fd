"""A streaming parser of multipart forms: fields in any order, a file's bytes piece by piece."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.uploads.content_disposition import parse_disposition
from luthier.core.errors import InvalidRequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_FIELD_BYTES = 64 * 1024
_MAX_PARTS = 32


@dataclass(frozen=True)
class FieldPart:
    """A form field that is not a file."""

    name: str
    value: str


@dataclass(frozen=True)
class FileBegin:
    """The start of a file."""

    name: str
    filename: str


@dataclass(frozen=True)
class FileBytes:
    """A piece of the file that began last."""

    content: bytes


Part = FieldPart | FileBegin | FileBytes


def form_body(required: list[str], properties: dict[str, Any]) -> dict[str, Any]:
    """Return the OpenAPI description of an operation whose body is a form."""
    schema = {"type": "object", "required": required, "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


class _Collector:
    """Turns the parser's callbacks into parts, which `take` returns after every chunk."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.is_complete = False
        self._num_parts = 0
        self._header_field = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._name = ""
        self.is_in_file = False
        self._value = b""

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self.on_part_begin,
            "on_part_data": self.on_part_data,
            "on_part_end": self.on_part_end,
            "on_header_field": self.on_header_field,
            "on_header_value": self.on_header_value,
            "on_header_end": self.on_header_end,
            "on_headers_finished": self.on_headers_finished,
            "on_end": self.on_end,
        }

    def on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise InvalidRequestError(f"The form has more than {_MAX_PARTS} parts.")
        self._headers = {}
        self._value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_field += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header_field.lower()] = self._header_value
        self._header_field = self._header_value = b""

    def on_headers_finished(self) -> None:
        self._name, filename = parse_disposition(self._headers.get(b"content-disposition", b""))
        if filename is not None:
            self.parts.append(FileBegin(self._name, filename))
            self.is_in_file = True

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self.is_in_file:
            self.parts.append(FileBytes(data[start:end]))
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(f"The field {self._name[:40]!r} is too long.", param=self._name[:40])

    def on_part_end(self) -> None:
        if self.is_in_file:
            self.is_in_file = False
        else:
            self.parts.append(FieldPart(self._name, self._value.decode("utf-8", "replace")))

    def on_end(self) -> None:
        self.is_complete = True

    def take(self) -> list[Part]:
        taken, self.parts = self.parts, []
        return taken


async def read_form(content_type: str, chunks: AsyncIterator[bytes], *, fields: str) -> AsyncIterator[Part]:
    """Yield the parts of a form in the order of the body; memory stays at about one chunk.

    Args:
        fields: the expected fields, for error messages.

    Raises:
        InvalidRequestError: when the body is not a well-formed multipart form, or ends too early.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequestError(f"Send the body as multipart/form-data, with {fields}.")
    collector = _Collector()
    # Bytes since the last carriage return: within the length of a boundary it may have begun one.
    num_since_return, num_boundary_bytes = 0, len(boundary) + 8
    try:
        parser = MultipartParser(boundary, collector.callbacks())
        async for chunk in chunks:
            place = chunk.rfind(b"\r")
            if place < 0 and collector.is_in_file and num_since_return > num_boundary_bytes:
                # A boundary begins with a carriage return, which is much faster to search for.
                yield FileBytes(chunk)
                continue
            num_since_return = len(chunk) - place if place >= 0 else num_since_return + len(chunk)
            parser.write(chunk)
            for part in collector.take():
                yield part
    except FormParserError as error:
        raise InvalidRequestError("The body is no well-formed multipart form.") from error
    if not collector.is_complete:
        raise InvalidRequestError("The form ends before its closing boundary; nothing was stored.")
