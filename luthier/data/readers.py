"""Lines of a file of rows. One place says what a line is, for uploads and for prepare alike."""

from collections.abc import Iterator
from pathlib import Path

_BOM = b"\xef\xbb\xbf"


def clean_line(line: bytes, number: int) -> bytes:
    """Return a line without its carriage return and, on line 1 (`number`), without a byte order mark."""
    if number == 1:
        line = line.removeprefix(_BOM)
    return line.removesuffix(b"\r")


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but spaces and tabs."""
    return not line.strip(b" \t\r")


def iterate_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line that is not blank, in the file's order."""
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = clean_line(raw.removesuffix(b"\n"), number)
            if not is_blank(line):
                yield number, line
