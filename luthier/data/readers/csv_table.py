"""CSV (RFC 4180): a header row that names the keys, then a record a row. Separated by comma, semicolon or
tab, whichever makes the header name keys of a format.
"""

import csv
import io
from collections.abc import Iterable, Iterator

import msgspec

from luthier.data.formats import discover
from luthier.data.formats.base import Fault, escape_text
from luthier.data.readers.base import Limits, RawRow, split_lines, too_long
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


def read_csv(chunks: Iterable[bytes], limits: Limits) -> Iterator[RawRow | Fault]:
    """Yield the rows of a table. A record longer than `max_row_bytes` is a fault and not kept."""
    table: _Table | None = None
    first_blank: int | None = None
    for number, record in _records(chunks, limits.max_row_bytes):
        if isinstance(record, bytes) and not record.strip(b" \t"):
            first_blank = first_blank or number
            continue
        if first_blank is not None:
            yield Fault(first_blank, None, None, "line.blank", "The line is blank; remove it.")
            first_blank = None
        if isinstance(record, Fault):
            yield record
        elif table is None:
            table = _Table(record)
            yield from table.check_header(number)
        elif table.is_sound:
            yield table.read(record, number)


def _records(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | Fault]]:
    """Yield each record with the line where it begins; a fault instead of one that is not kept."""
    record = bytearray()
    num_lines, begins = 0, 1
    is_quoted = is_too_long = False
    for part, is_ended in split_lines(chunks):
        is_quoted ^= part.count(b'"') % 2 == 1
        record += part
        if is_too_long or len(record) > max_bytes:
            is_too_long = True
            record.clear()
        num_lines += is_ended
        if is_ended and is_quoted:
            record += b"\n"
        elif is_ended:
            yield begins, too_long(begins, max_bytes) if is_too_long else _without_return(record)
            record.clear()
            begins, is_too_long = num_lines + 1, False
    if is_quoted:
        advice = "A quote that begins here is not closed before the end of the file."
        yield begins, Fault(begins, None, None, "csv.quote", advice)
    elif record or is_too_long:
        yield begins, too_long(begins, max_bytes) if is_too_long else _without_return(record)


def _without_return(record: bytearray) -> bytes:
    return bytes(record).removesuffix(b"\r")


class _Table:
    """The columns of a table, and the format that its header names."""

    def __init__(self, header: bytes) -> None:
        found = find_header(header.removeprefix(b"\xef\xbb\xbf"))
        self._delimiter, self._header = found or (",", [])
        self._format = find_format(self._header)
        # Of a table with a broken header no row can be read.
        self.is_sound = True

    def check_header(self, number: int) -> Iterator[Fault]:
        """Yield the faults of the header, which is on line `number`."""
        for fault in self._header_faults(number):
            self.is_sound = False
            yield fault

    def _header_faults(self, number: int) -> Iterator[Fault]:
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

    def read(self, record: bytes, number: int) -> RawRow | Fault:
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
        if len(cells) != len(self._header):
            advice = (
                f"The row has {len(cells)} cells and the header {len(self._header)}; quote cells with "
                "separators."
            )
            return Fault(number, None, None, "csv.cells", advice)
        return self._join(cells, number)

    def _join(self, cells: list[str], number: int) -> RawRow | Fault:
        fields: dict[str, object] = {}
        json_keys: frozenset[str] = frozenset() if self._format is None else self._format.json_keys
        for column, (key, cell) in enumerate(zip(self._header, cells, strict=True), start=1):
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
