"""The rows of a stored file in any container and format: for prepare, estimates and reports."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from luthier.data.formats.base import Fault, Row, RowFormat
from luthier.data.readers.base import CHECKED, RawRow
from luthier.data.readers.detect_format import check_row, detect_format
from luthier.data.readers.stream import RowStream

_CHUNK_BYTES = 1024 * 1024


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            yield chunk


def locate(fault: Fault, raw: RawRow) -> Fault:
    """Return a fault of a row's content with its place in the file."""
    if not raw.is_numbered_by_row:
        return fault
    if raw.line == 0:
        return dataclasses.replace(fault, line=raw.number, row=raw.number)
    line, column = raw.line, fault.column
    if column is not None:
        before = raw.content.decode("utf-8", errors="replace")[: column - 1]
        num_newlines = before.count("\n")
        line += num_newlines
        column = column - before.rindex("\n") - 1 if num_newlines else column + raw.column - 1
    return dataclasses.replace(fault, line=line, column=column, row=raw.number)


class FileRows:
    """The rows of a file that was checked at upload, or of another stream, read one by one.

    The first row decides the format; None before it.
    """

    def __init__(self, source: Path | RowStream) -> None:
        self._stream = (
            source if isinstance(source, RowStream) else RowStream(read_chunks(source), CHECKED, source)
        )
        self.format: RowFormat | None = None

    def raw(self) -> Iterator[RawRow | Fault]:
        """Yield each raw row, or a fault instead of it; `format` is known before the first row."""
        for raw in self._stream:
            if self.format is None and not isinstance(raw, Fault):
                found = detect_format(raw.content, raw.number)
                if isinstance(found, Fault):
                    yield locate(found, raw)
                    continue
                self.format = found
            yield raw

    def __iter__(self) -> Iterator[tuple[RawRow, Row] | Fault]:
        """Yield each row with its place, or its faults; `format` is known before the first row."""
        for raw in self.raw():
            yield from [raw] if isinstance(raw, Fault) else self.read(raw)

    def read(self, raw: RawRow) -> list[tuple[RawRow, Row]] | list[Fault]:
        """Return the row of a raw one, which comes without its content and has its place; or its faults."""
        assert self.format is not None, "the first row decides it"
        row = check_row(self.format, raw.content, raw.number)
        if isinstance(row, list):
            return [locate(fault, raw) for fault in row]
        return [(raw._replace(content=b""), self.format.make_row(row))]

    def check(self, raw: RawRow) -> list[Fault]:
        assert self.format is not None, "the first row decides it"
        if self.format.accepts_by_type(raw.content):
            return []
        row = check_row(self.format, raw.content, raw.number)
        return [locate(fault, raw) for fault in row] if isinstance(row, list) else []
