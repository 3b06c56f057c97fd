"""JSON lines: a row on each line; carriage returns and a leading byte order mark are dropped."""

from collections.abc import Iterable, Iterator

from luthier.data.formats.base import Fault
from luthier.data.readers.base import Limits, RawRow, split_lines, too_long

_BOM = b"\xef\xbb\xbf"


def read_json_lines(chunks: Iterable[bytes], limits: Limits) -> Iterator[RawRow | Fault]:
    """Yield the rows. A line longer than `max_row_bytes` (without newline) is a fault and not kept."""
    first_blank: int | None = None
    for number, (line, is_too_long) in enumerate(_whole_lines(chunks, limits.max_row_bytes), start=1):
        content = line.removeprefix(_BOM if number == 1 else b"").removesuffix(b"\r")
        if not is_too_long and not content.strip(b" \t\r"):
            first_blank = first_blank or number
            continue
        # Blank lines are no fault at the end of a file, so they count only once a row follows.
        if first_blank is not None:
            yield Fault(first_blank, None, None, "line.blank", "The line is blank; remove it.")
            first_blank = None
        yield too_long(number, limits.max_row_bytes) if is_too_long else RawRow(number, content, number)


def _whole_lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """Yield each line and whether it is longer than allowed, and then not kept."""
    parts: list[bytes] = []
    num_bytes = 0
    for part, is_ended in split_lines(chunks):
        num_bytes += len(part)
        if num_bytes > max_bytes:
            parts.clear()
        else:
            parts.append(part)
        if is_ended:
            yield b"".join(parts), num_bytes > max_bytes
            parts.clear()
            num_bytes = 0
    if num_bytes:
        yield b"".join(parts), num_bytes > max_bytes
