"""Checking a file of rows while its bytes stream by: hashes, counts and faults with constant memory.

Only what can be told from the text alone; what needs a template or a tokenizer is found by prepare.
"""

import hashlib
from typing import NamedTuple

from luthier.core.errors import InvalidFileFormatError
from luthier.data.formats import discover
from luthier.data.formats.base import Fault, RowFormat, tell_faults
from luthier.data.plain_chat import count_plain_rows
from luthier.data.readers import clean_line, is_blank

MAX_FAULTS = 20

# First bytes of files that people upload by mistake, and what to do about each.
_FOREIGN_FILES = (
    (b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (b"PK\x03\x04", "is a zip archive: unpack it first"),
    (b"BZh", "is compressed with bzip2: unpack it first"),
    (b"\xfd7zX", "is compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (b"PAR1", "is a Parquet file: convert it to JSON lines first"),
    (b"\xff\xfe", "is UTF-16 or UTF-32: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16: save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "is UTF-32: save it as UTF-8"),
)
_HEAD_BYTES = 4


class FileFacts(NamedTuple):
    """What is known of a checked file; `sha256` is 64 hex digits over all its bytes."""

    num_rows: int
    num_bytes: int
    sha256: str


class FileChecker:
    """Check a file fed in chunks of any size; the result does not depend on where they were cut.

    Args:
        max_line_bytes: longest line, its newline not counted; longer ones are a fault and not kept.
        row_format: the format of the rows; OpenAI's chat rows when None.
    """

    def __init__(self, *, max_line_bytes: int = 8 * 1024 * 1024, row_format: RowFormat | None = None) -> None:
        self._format = row_format or discover()["chat"]
        self._max_line_bytes = max_line_bytes
        self._sha256 = hashlib.sha256()
        self._num_bytes = 0
        self._num_rows = 0
        self._num_lines = 0
        self._head = b""
        self._line = bytearray()
        self._is_too_long = False
        self._first_blank: int | None = None
        self._faults: list[Fault] = []

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Args:
            chunk: any number of bytes.

        Raises:
            InvalidFileFormatError: once the file is known not to be text, or has 20 faults.
        """
        self._sha256.update(chunk)
        self._num_bytes += len(chunk)
        if len(self._head) < _HEAD_BYTES:
            self._head += bytes(chunk[: _HEAD_BYTES - len(self._head)])
            if len(self._head) == _HEAD_BYTES:
                self._refuse_foreign()
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._extend(chunk[start:end])
            self._end_line()
            start = end + 1
        self._extend(chunk[start:])

    def take_lines(self, lines: bytes) -> None:
        """Take the next bytes, whole lines all: what is plainly written is judged at once.

        Args:
            lines: each with its line end.

        Raises:
            InvalidFileFormatError: as `feed` does.
        """
        num_rows = count_plain_rows(lines) if self._is_between_rows(len(lines)) else None
        if num_rows is None:
            self.feed(lines)
            return
        self._sha256.update(lines)
        self._num_bytes += len(lines)
        self._num_rows += num_rows
        self._num_lines += num_rows

    def _is_between_rows(self, num_bytes: int) -> bool:
        """Whether the next line begins with the next byte, and can be judged by itself."""
        return (
            self._format.name == "chat"
            and self._num_rows > 0
            and num_bytes <= self._max_line_bytes
            and not self._line
            and not self._is_too_long
            and self._first_blank is None
        )

    def finish(self) -> FileFacts:
        """Say that no more bytes follow.

        Returns:
            Rows, bytes and sha256 of the file.

        Raises:
            InvalidFileFormatError: when any line has a fault, or there is no row.
        """
        self._refuse_foreign()
        if self._line or self._is_too_long:
            self._end_line()
        if self._faults:
            raise self._error()
        if self._num_rows == 0:
            raise InvalidFileFormatError(
                'The file is empty. Write one JSON object a line, such as {"messages": [...]}.', param="file"
            )
        return FileFacts(self._num_rows, self._num_bytes, self._sha256.hexdigest())

    def _refuse_foreign(self) -> None:
        for magic, what in _FOREIGN_FILES:
            if self._head.startswith(magic):
                raise InvalidFileFormatError(f"The file {what}, as JSON lines in UTF-8.", param="file")

    def _extend(self, part: bytes) -> None:
        if self._is_too_long:
            return
        if len(self._line) + len(part) > self._max_line_bytes:
            self._is_too_long = True
            self._line.clear()
            return
        self._line += part

    def _end_line(self) -> None:
        self._num_lines += 1
        number = self._num_lines
        line = clean_line(bytes(self._line), number)
        is_too_long, self._is_too_long = self._is_too_long, False
        self._line.clear()
        if not is_too_long and is_blank(line):
            self._first_blank = self._first_blank or number
            return
        # Blank lines are no fault at the end of a file, so they count only once a row follows.
        if self._first_blank is not None:
            self._add(Fault(self._first_blank, None, None, "line.blank", "The line is blank; remove it."))
            self._first_blank = None
        self._num_rows += 1
        if is_too_long:
            message = f"The line is longer than {self._max_line_bytes} bytes; shorten or split the row."
            self._add(Fault(number, None, None, "line.too_long", message))
        elif self._format.read(line) is None:
            for fault in self._format.explain(line, number):
                self._add(fault)

    def _add(self, fault: Fault) -> None:
        self._faults.append(fault)
        if len(self._faults) == MAX_FAULTS:
            raise self._error()

    def _error(self) -> InvalidFileFormatError:
        num_faults = len(self._faults)
        if num_faults == 1:
            return InvalidFileFormatError(str(self._faults[0]), param="file")
        count = f"{num_faults} or more" if num_faults == MAX_FAULTS else str(num_faults)
        return InvalidFileFormatError(
            f"The file breaks the format in {count} places. {tell_faults(self._faults)}", param="file"
        )
