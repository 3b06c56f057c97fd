"""JSON lines: a row on each line; carriage returns and a leading byte order mark are dropped."""

from collections.abc import Iterator

from luthier.data.formats.base import Fault
from luthier.data.readers.base import Limits, RawRow, too_long

_BOM = b"\xef\xbb\xbf"


class JsonLinesReader:
    """Reads JSON lines. A line longer than `max_row_bytes` (without newline) is a fault and not kept."""

    name = "jsonl"

    def __init__(self, limits: Limits) -> None:
        self._max_line_bytes = limits.max_row_bytes
        self._num_lines = 0
        # The beginning of a line whose end has not come, and how much of it came.
        self._parts: list[bytes] = []
        self._num_waiting = 0
        self._first_blank: int | None = None

    def feed(self, chunk: bytes) -> Iterator[RawRow | Fault]:
        """Yield the rows that end in the next bytes."""
        lines = chunk.split(b"\n")
        last = lines.pop()
        if lines:
            if self._parts or self._num_waiting:
                self._wait(lines[0])
                lines[0] = b"".join(self._parts)
                num_bytes, self._num_waiting = self._num_waiting, 0
                self._parts.clear()
                yield from self._end_line(lines[0], num_bytes)
                del lines[0]
            for line in lines:
                is_clean = line[:1] == b"{" and line[-1:] == b"}" and self._first_blank is None
                if is_clean and len(line) <= self._max_line_bytes:
                    # Nearly all lines: there is nothing to clean.
                    self._num_lines += 1
                    yield RawRow(self._num_lines, line, self._num_lines)
                else:
                    yield from self._end_line(line, len(line))
        self._wait(last)

    def _wait(self, part: bytes) -> None:
        self._num_waiting += len(part)
        if self._num_waiting > self._max_line_bytes:
            self._parts.clear()
        elif part:
            self._parts.append(part)

    def finish(self) -> Iterator[RawRow | Fault]:
        """Yield the last row where no newline ended it."""
        if self._num_waiting:
            yield from self._end_line(b"".join(self._parts), self._num_waiting)

    def _end_line(self, raw: bytes, num_bytes: int) -> Iterator[RawRow | Fault]:
        self._num_lines += 1
        number = self._num_lines
        is_too_long = num_bytes > self._max_line_bytes
        line = raw.removeprefix(_BOM if number == 1 else b"").removesuffix(b"\r")
        if not is_too_long and not line.strip(b" \t\r"):
            self._first_blank = self._first_blank or number
            return
        # Blank lines are no fault at the end of a file, so they count only once a row follows.
        if self._first_blank is not None:
            yield Fault(self._first_blank, None, None, "line.blank", "The line is blank; remove it.")
            self._first_blank = None
        yield too_long(number, self._max_line_bytes) if is_too_long else RawRow(number, line, number)
