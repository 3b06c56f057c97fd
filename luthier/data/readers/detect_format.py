"""The format of a file, by its first row, and the faults of a row that is not of it."""

from collections.abc import Collection
from typing import Any

from luthier.data.formats import discover
from luthier.data.formats._json_line import parse_line
from luthier.data.formats.base import Fault, RowFormat

# The format whose faults a row of unknown keys is given.
_DEFAULT = "chat"


def find_format(keys: Collection[str]) -> RowFormat | None:
    """Return the format of rows with these keys, or of a table with these columns.

    It is the format with the longest signature among the keys; else the one that knows most of them, whose
    explanation says what is missing; None when no format knows any.
    """
    known = sorted(discover().values(), key=lambda one: one.name)
    present = frozenset(keys)
    whole = [one for one in known if one.signature <= present]
    if whole:
        return max(whole, key=lambda one: len(one.signature))
    # Of two formats that know as many keys, the one with fewer of its own that are missing.
    best = max(known, key=lambda one: (len(one.keys & present), -len(one.signature - present)))
    return best if best.keys & present else None


def detect_format(line: bytes, number: int) -> RowFormat | Fault:
    """Return the format of a file by its first row, on line `number`; or why that is no JSON object."""
    row = parse_line(line, number)
    if isinstance(row, Fault):
        return row
    return find_format(row) or discover()[_DEFAULT]


def check_row(row_format: RowFormat, line: bytes, number: int) -> dict[str, Any] | list[Fault]:
    """Return a row of the file's format, or its faults: one alone when it has another format."""
    row = parse_line(line, number)
    if isinstance(row, Fault):
        return [row]
    if not row_format.signature & row.keys():
        other = find_format(row)
        if other is not None and other.name != row_format.name and other.signature <= row.keys():
            advice = (
                f"The row is of the format {other.name}, and the file's first row made it one of "
                f"{row_format.name}: a file has one format. Put such rows into a file of their own."
            )
            return [Fault(number, None, None, "row.other_format", advice)]
    return [Fault(number, None, *broken) for broken in row_format.check(row)] or row
