"""The rows of a stored file in any container and format: for prepare, estimates and reports."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from luthier.data.formats.base import Fault, Row, RowFormat
from luthier.data.readers.base import CHECKED, Limits, RawRow
from luthier.data.readers.detect_format import detect_format, explain_row
from luthier.data.readers.parquet import read_parquet
from luthier.data.readers.stream import RowStream

_CHUNK_BYTES = 1024 * 1024


def read_raw_rows(path: Path, limits: Limits = CHECKED) -> Iterator[RawRow | Fault]:
    """Yield the raw rows of a file, or faults instead of them, in the file's order.

    Raises:
        InvalidFileFormatError: when the file holds no rows.
    """
    stream = RowStream(limits)
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            yield from stream.feed(chunk)
            if stream.is_parquet:
                break
    yield from stream.finish()
    if stream.is_parquet:
        yield from read_parquet(path, limits)


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
    """The rows of a file, read one by one. The first row decides the format."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.format: RowFormat | None = None

    def raw(self) -> Iterator[RawRow | Fault]:
        """Yield each raw row, or a fault instead of it; `format` is known before the first row."""
        for raw in read_raw_rows(self._path):
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
            if isinstance(raw, Fault):
                yield raw
                continue
            if self.format is None:
                raise ValueError("A row came before the file's format was known.")
            found = read_row(self.format, raw)
            if isinstance(found, list):
                yield from found
            else:
                yield found


def read_row(row_format: RowFormat, raw: RawRow) -> tuple[RawRow, Row] | list[Fault]:
    """Read one row of a file: the raw row without its content, by which `locate` works, and the row.

    Or its faults.
    """
    row = row_format.read(raw.content)
    if row is not None:
        return raw._replace(content=b""), row
    return [locate(fault, raw) for fault in explain_row(row_format, raw.content, raw.number)]
