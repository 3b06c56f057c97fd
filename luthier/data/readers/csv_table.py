"""CSV (RFC 4180): a header row that names the keys, then a record a row. Separated by comma, semicolon or
tab, whichever makes the header name keys of a format.
"""

import csv
import io
from collections.abc import Iterator

import msgspec

from luthier.data.formats import discover
from luthier.data.formats.base import Fault, RowFormat, escape_text
from luthier.data.readers.base import Limits, RawRow, too_long
from luthier.data.readers.detect_format import find_format

_DELIMITERS = (",", ";", "\t")
# The module's own limit is 128 KiB for a cell; ours is that of a whole row.
csv.field_size_limit(2**31 - 1)


def _split(record: str, delimiter: str) -> list[str]:
    """Return the cells of one record; ValueError when its quotes do not fit."""
    try:
        rows = list(csv.reader(io.StringIO(record, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if len(rows) != 1:
        raise ValueError("a quote is misplaced")
    return rows[0]


def find_header(line: bytes) -> tuple[str, list[str]] | None:
    """Return delimiter and columns of a file's first line; None when no format knows any of the columns.

    The line has no byte order mark and no line end.
    """
    known = {key for one in discover().values() for key in one.keys}
    best: tuple[int, str, list[str]] | None = None
    for delimiter in _DELIMITERS:
        try:
            names = [name.strip() for name in _split(line.decode("utf-8"), delimiter)]
        except ValueError:
            continue
        num_known = len(known & set(names))
        if num_known and (best is None or num_known > best[0]):
            best = (num_known, delimiter, names)
    return None if best is None else (best[1], best[2])


class CsvReader:
    """Reads a table. A record longer than `max_row_bytes` is a fault and not kept."""

    name = "csv"

    def __init__(self, limits: Limits) -> None:
        self._max_row_bytes = limits.max_row_bytes
        self._tail = bytearray()
        # The lines of a record whose quote is still open.
        self._record = bytearray()
        self._is_open = self._is_too_long = False
        self._num_lines = 0
        self._record_line = 0
        self._first_blank: int | None = None
        self._header: list[str] | None = None
        self._is_broken = False
        self._delimiter = ","
        self._format: RowFormat | None = None

    def feed(self, chunk: bytes) -> Iterator[RawRow | Fault]:
        """Yield the rows that end in the next bytes."""
        if self._is_open and b'"' not in chunk and b'"' not in self._tail:
            # All of it is within one cell, however many lines it has.
            self._num_lines += chunk.count(b"\n")
            self._extend_tail(chunk)
            return
        lines = chunk.split(b"\n")
        last = lines.pop()
        for line in lines:
            self._extend_tail(line)
            yield from self._end_line(b"\n")
        self._extend_tail(last)

    def finish(self) -> Iterator[RawRow | Fault]:
        """Yield the last row; an open quote is a fault."""
        if self._tail or self._is_too_long:
            yield from self._end_line(b"")
        if self._is_open:
            self._is_open = False
            advice = "A quote that begins here is not closed before the end of the file."
            yield Fault(self._record_line, None, None, "csv.quote", advice)

    def _extend_tail(self, part: bytes) -> None:
        self._tail += part
        if len(self._tail) + len(self._record) > self._max_row_bytes:
            # A record that is too long is not kept, but its quotes are counted on.
            self._is_too_long = True
            self._is_open ^= self._tail.count(b'"') % 2 == 1
            self._tail.clear()
            self._record.clear()

    def _end_line(self, newline: bytes) -> Iterator[RawRow | Fault]:
        self._num_lines += 1
        if not self._record_line:
            self._record_line = self._num_lines
        line = bytes(self._tail)
        self._tail.clear()
        self._is_open ^= line.count(b'"') % 2 == 1
        if not self._is_too_long:
            self._record += line
        if self._is_open:
            if not self._is_too_long:
                self._record += newline
            return
        record = bytes(self._record).removesuffix(b"\r")
        self._record.clear()
        number, self._record_line = self._record_line, 0
        is_too_long, self._is_too_long = self._is_too_long, False
        yield from self._end_record(record, number, is_too_long=is_too_long)

    def _end_record(self, record: bytes, number: int, *, is_too_long: bool) -> Iterator[RawRow | Fault]:
        if not is_too_long and not record.strip(b" \t"):
            self._first_blank = self._first_blank or number
            return
        if self._first_blank is not None:
            yield Fault(self._first_blank, None, None, "line.blank", "The line is blank; remove it.")
            self._first_blank = None
        if is_too_long:
            yield too_long(number, self._max_row_bytes)
        elif self._header is None:
            # Of a table with a broken header no row can be read.
            for fault in self._begin(record, number):
                self._is_broken = True
                yield fault
        elif not self._is_broken:
            yield self._read(record, number, self._header)

    def _begin(self, record: bytes, number: int) -> Iterator[Fault]:
        found = find_header(record.removeprefix(b"\xef\xbb\xbf"))
        self._delimiter, self._header = found or (",", [])
        self._format = find_format(self._header)
        seen: set[str] = set()
        for place, name in enumerate(self._header, start=1):
            if name in seen:
                advice = "Two columns have this name; rename or remove one."
                yield Fault(number, place, escape_text(name), "csv.column_twice", advice)
            elif self._format is not None and name not in self._format.keys:
                known = ", ".join(sorted(self._format.keys))
                advice = f"Unknown column; rows of the format {self._format.name} have {known}."
                yield Fault(number, place, escape_text(name), "csv.unknown_column", advice)
            seen.add(name)
        missing: frozenset[str] = frozenset() if self._format is None else self._format.signature - seen
        for name in sorted(missing):
            advice = f'The column "{name}" is missing from the header.'
            yield Fault(number, None, name, "csv.missing_column", advice)

    def _read(self, record: bytes, number: int, header: list[str]) -> RawRow | Fault:
        if (place := record.find(b"\0")) >= 0:
            advice = "The row holds a NUL byte; save the file as plain UTF-8 text, not UTF-16 or binary."
            return Fault(number, place + 1, None, "text.nul", advice)
        try:
            text = record.decode("utf-8")
        except UnicodeDecodeError as error:
            advice = f"Byte {error.start + 1} of the row is not UTF-8; save the file as UTF-8."
            return Fault(number, error.start + 1, None, "text.utf8", advice)
        try:
            cells = _split(text, self._delimiter)
        except ValueError as error:
            advice = f"This is no record of a CSV file: {error}. Double each quote inside of a quoted cell."
            return Fault(number, None, None, "csv.quote", advice)
        if len(cells) != len(header):
            advice = (
                f"The row has {len(cells)} cells and the header {len(header)}; quote cells with separators."
            )
            return Fault(number, None, None, "csv.cells", advice)
        return self._join(cells, number, header)

    def _join(self, cells: list[str], number: int, header: list[str]) -> RawRow | Fault:
        fields: dict[str, object] = {}
        json_keys: frozenset[str] = frozenset() if self._format is None else self._format.json_keys
        for column, (key, cell) in enumerate(zip(header, cells, strict=True), start=1):
            if key not in json_keys:
                fields[key] = cell
            elif cell.strip():
                try:
                    # A cell that is one whole JSON value can't add keys to the row.
                    msgspec.json.decode(cell)
                except (msgspec.MsgspecError, RecursionError):
                    advice = f'The cell of the column "{key}" must hold JSON.'
                    return Fault(number, column, key, "csv.json", advice)
                fields[key] = msgspec.Raw(cell.encode())
        return RawRow(number, msgspec.json.encode(fields), number)
