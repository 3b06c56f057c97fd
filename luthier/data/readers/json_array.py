"""One JSON array of rows, read element by element: only the element that is being read is in memory.

Where an element ends is found by counting brackets outside of strings; whether it is JSON, its reader says.
"""

import collections
import re
from collections.abc import Iterable, Iterator

from luthier.data.formats.base import Fault
from luthier.data.readers.base import Limits, RawRow, too_long

_STRUCTURE = re.compile(rb'["{}\[\],]')
# The rest of a string, its closing quote included; and as much of it as is there.
_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_STRING_SO_FAR = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SPACES = b" \t\r\n"
_OPEN, _CLOSE, _COMMA, _QUOTE = b"{[", b"}]", b",", b'"'
# What may precede a row of the greatest length.
_MAX_SPACES = 64 * 1024


class JsonArrayReader:
    """Reads a JSON array. An element longer than `max_row_bytes` is a fault and not kept."""

    def __init__(self, limits: Limits) -> None:
        self._max_row_bytes = limits.max_row_bytes
        # The bytes not yet yielded, from the beginning of an element; and how far they were scanned.
        self._buffer = bytearray()
        self._position = 0
        self._depth = 0
        self._is_in_string = self._is_over = False
        # Where an element began that is too long to be kept.
        self._too_long_from: tuple[int, int] | None = None
        self._num_rows = 0
        # The place of the buffer's first byte.
        self._line, self._column = 1, 1

    def read(self, chunks: Iterable[bytes]) -> Iterator[RawRow | Fault]:
        """Yield the rows of an array whose bracket is in the first chunk."""
        remaining = iter(chunks)
        self._buffer += next(remaining)
        self._drop(self._buffer.index(b"[") + 1)
        while not self._is_over:
            while not self._is_over and (end := self._find_end()) is not None:
                yield from self._end_element(end)
            if self._is_over:
                break
            if len(self._buffer) > self._max_row_bytes + _MAX_SPACES:
                self._too_long_from = self._too_long_from or (self._line, self._column)
                self._position -= self._drop(self._position)
            if not self._extend(remaining):
                advice = "The JSON array is not closed: the file ends within it. Was it cut?"
                self._drop(len(self._buffer))
                yield Fault(self._line, self._column, None, "json.syntax", advice)
                return
        yield from self._refuse_rest(remaining)

    def _extend(self, chunks: Iterator[bytes]) -> bool:
        """Add the next chunk; return whether there was one."""
        chunk = next(chunks, None)
        self._buffer += chunk or b""
        return chunk is not None

    def _find_end(self) -> int | None:
        """Return where the element ends: at a comma or the array's bracket; None when that has not come."""
        buffer, position = self._buffer, self._position
        while True:
            if self._is_in_string:
                match = _STRING.match(buffer, position)
                if match is None:
                    rest = _STRING_SO_FAR.match(buffer, position)
                    self._position = position if rest is None else rest.end()
                    return None
                self._is_in_string, position = False, match.end()
            found = _STRUCTURE.search(buffer, position)
            if found is None:
                self._position = len(buffer)
                return None
            character, position = found.group(), found.end()
            if character == _QUOTE:
                self._is_in_string = True
            elif character in _OPEN:
                self._depth += 1
            elif self._depth > 0:
                self._depth -= character in _CLOSE
            else:
                self._position = position
                return position - 1

    def _end_element(self, end: int) -> Iterator[RawRow | Fault]:
        mark = bytes(self._buffer[end : end + 1])
        begun, self._too_long_from = self._too_long_from, None
        num_spaces = 0 if begun else end - len(self._buffer[:end].lstrip(_SPACES))
        content = bytes(self._buffer[num_spaces:end].rstrip(_SPACES))
        self._drop(num_spaces)
        line, column = begun or (self._line, self._column)
        self._drop(end - num_spaces + 1)
        self._position = 0
        self._is_over = mark != _COMMA
        if not content and not begun and mark == b"]" and self._num_rows == 0:
            return
        self._num_rows += 1
        if begun or len(content) > self._max_row_bytes:
            yield too_long(line, self._max_row_bytes, self._num_rows)
        elif not content:
            advice = "A row is missing here, beside a comma; remove the comma."
            yield Fault(line, column, None, "json.syntax", advice, self._num_rows)
        else:
            yield RawRow(self._num_rows, content, line, column, is_numbered_by_row=True)

    def _refuse_rest(self, chunks: Iterator[bytes]) -> Iterator[Fault]:
        while not (rest := self._buffer.lstrip(_SPACES)):
            self._drop(len(self._buffer))
            if not self._extend(chunks):
                return
        self._drop(len(self._buffer) - len(rest))
        advice = "Something follows the end of the JSON array; a file is one array."
        yield Fault(self._line, self._column, None, "json.syntax", advice)
        # A damaged gzip file is refused as such.
        collections.deque(chunks, maxlen=0)

    def _drop(self, num_bytes: int) -> int:
        """Drop the buffer's first bytes, and return their number."""
        gone = self._buffer[:num_bytes]
        num_newlines = gone.count(b"\n")
        if num_newlines:
            self._line += num_newlines
            self._column = len(gone) - gone.rindex(b"\n")
        else:
            # Columns are characters: continuation bytes do not count.
            self._column += len(gone.decode("utf-8", errors="ignore"))
        del self._buffer[:num_bytes]
        return num_bytes
