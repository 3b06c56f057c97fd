"""Which format a file has, told by its first row, and what is wrong with a row that is not of it."""

from collections.abc import Collection

from luthier.data.formats import discover
from luthier.data.formats._json_line import parse_line
from luthier.data.formats.base import Fault, RowFormat

# Of a row that has nothing of any format the faults are told as if it were a chat.
_DEFAULT = "chat"


def find_format(keys: Collection[str]) -> RowFormat | None:
    """Return the format of rows with these keys.

    Args:
        keys: of a row, or the names of a table's columns.

    Returns:
        The format with the longest signature among the keys; else the one that knows most of them, whose
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


def recognise(line: bytes, number: int) -> RowFormat | Fault:
    """Tell the format of a file by its first row.

    Args:
        number: of the line, from 1.

    Returns:
        The format, or the fault that keeps the line from being an object.
    """
    row = parse_line(line, number)
    if isinstance(row, Fault):
        return row
    return find_format(row) or discover()[_DEFAULT]


def explain_row(row_format: RowFormat, line: bytes, number: int) -> list[Fault]:
    """Say what is wrong with a row that the file's format refused.

    Args:
        number: of the line, from 1.

    Returns:
        At least one fault; one alone when the row is of another format.
    """
    row = parse_line(line, number)
    if isinstance(row, Fault):
        return [row]
    if not row_format.signature & row.keys():
        other = find_format(row)
        if other is not None and other.name != row_format.name and other.signature <= row.keys():
            told = (
                f"The row is of the format {other.name}, and the file's first row made it one of "
                f"{row_format.name}: a file has one format. Put such rows into a file of their own."
            )
            return [Fault(number, None, None, "row.other_format", told)]
    return row_format.explain(row, number)
