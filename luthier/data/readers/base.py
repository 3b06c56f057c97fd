"""What readers of rows have in common: chunks of bytes in, rows out, with the memory of one row."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from luthier.data.formats.base import Fault

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one file, in bytes and rows.

    `max_row_bytes` is the longest row. What a compressed file holds may be `max_expanded_bytes` in all, and
    beyond the first 16 MiB `max_expansion_ratio` times what it came as.
    """

    max_row_bytes: int = 8 * MIB
    max_expanded_bytes: int = 8 * 1024 * MIB
    max_expansion_ratio: float = 100.0
    max_rows: int = 5_000_000


# For files that were checked at upload: only what no machine can hold is refused.
CHECKED = Limits(
    max_row_bytes=1024 * MIB, max_expanded_bytes=2**60, max_expansion_ratio=2.0**60, max_rows=2**60
)


class RawRow(NamedTuple):
    """One row as a JSON object.

    `number` counts from 1: the line where the row begins, of a JSON array and of Parquet the row. `line` is
    the line where it begins, 0 where there are none, and `is_numbered_by_row` says which of the two
    `number` is; `column` is where in that line it begins, from 1.
    """

    number: int
    content: bytes
    line: int
    column: int = 1
    is_numbered_by_row: bool = False


def split_lines(chunks: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yield the parts of lines in the order of the bytes, and whether a newline follows the part.

    A line that spans chunks comes in several parts, so that none has to be kept whole.
    """
    for chunk in chunks:
        *ended, last = chunk.split(b"\n")
        for line in ended:
            yield line, True
        if last:
            yield last, False


def too_long(number: int, max_bytes: int, row: int | None = None) -> Fault:
    what = "line" if row is None else "row"
    advice = f"The {what} is longer than {max_bytes} bytes; shorten or split the row."
    return Fault(number, None, None, "line.too_long", advice, row)
