"""Rows of a stream of bytes in any container, which is detected by its content.

A file's name and type are not used: clients send both wrong.
"""

from collections.abc import Iterator

from luthier.core.errors import InvalidFileFormatError
from luthier.data.formats.base import Fault
from luthier.data.readers import gzip_stream, parquet
from luthier.data.readers.base import Limits, RawRow, RowReader
from luthier.data.readers.csv_table import CsvReader, find_header
from luthier.data.readers.json_array import JsonArrayReader
from luthier.data.readers.json_lines import JsonLinesReader

_BOM = b"\xef\xbb\xbf"
_SPACES = b" \t\r\n"
# First bytes of files that are uploaded by mistake, and what to do about each.
_FOREIGN_FILES = (
    (b"PK\x03\x04", "is a zip archive or a spreadsheet: unpack it, or save the sheet as CSV"),
    (b"BZh", "is compressed with bzip2: unpack it first, or use gzip"),
    (b"\xfd7zX", "is compressed with xz: unpack it first, or use gzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first, or use gzip"),
    (b"\xff\xfe", "is UTF-16 or UTF-32: save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16: save it as UTF-8"),
    (b"\x00\x00\xfe\xff", "is UTF-32: save it as UTF-8"),
)
_INSIDE_GZIP = (
    (gzip_stream.MAGIC, "is compressed twice: unpack it once"),
    (parquet.MAGIC, "holds Parquet, which is compressed in itself: unpack it"),
)
_MAGIC_BYTES = 4
# A header is looked for in no more than this.
_MAX_HEADER_BYTES = 64 * 1024


def _refuse_foreign(head: bytes, foreign: tuple[tuple[bytes, str], ...]) -> None:
    for magic, what in foreign:
        if head.startswith(magic):
            raise InvalidFileFormatError(
                f"The file {what}. Send JSON lines, a JSON array or CSV in UTF-8, also as gzip, or Parquet.",
                param="file",
            )


class RowStream:
    """Detects the container of a stream and yields its rows."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._head = b""
        self._text_head = b""
        self._gunzip: gzip_stream.Gunzip | None = None
        self._is_decided = False
        self._reader: RowReader | None = None
        self.is_parquet = False

    @property
    def container(self) -> str:
        """What the file is, such as `jsonl` or `csv+gzip`; empty while that is not known."""
        name = "parquet" if self.is_parquet else self._reader.name if self._reader else ""
        return f"{name}+gzip" if self._gunzip else name

    def feed(self, chunk: bytes) -> Iterator[RawRow | Fault]:
        """Yield the rows, or faults, that end in the next bytes; none of Parquet, read from the whole file.

        Raises:
            InvalidFileFormatError: when the file holds no rows, is damaged or expands beyond the limits.
        """
        if not self._is_decided:
            self._head += chunk
            if len(self._head) < _MAGIC_BYTES:
                return
            chunk = self._decide()
        yield from self._feed_decided(chunk)

    def _decide(self) -> bytes:
        head, self._head = self._head, b""
        self._is_decided = True
        self.is_parquet = head.startswith(parquet.MAGIC)
        if head.startswith(gzip_stream.MAGIC):
            self._gunzip = gzip_stream.Gunzip(self._limits)
        return head

    def _feed_decided(self, chunk: bytes) -> Iterator[RawRow | Fault]:
        if self.is_parquet:
            return
        if self._gunzip is None:
            yield from self._feed_text(chunk)
            return
        for block in self._gunzip.feed(chunk):
            yield from self._feed_text(block)

    def _feed_text(self, chunk: bytes) -> Iterator[RawRow | Fault]:
        if self._reader is None:
            self._text_head += chunk
            self._reader = self._find_reader(is_whole=False)
            if self._reader is None:
                return
            chunk, self._text_head = self._text_head, b""
        yield from self._reader.feed(chunk)

    def _find_reader(self, *, is_whole: bool) -> RowReader | None:
        """Return the reader for the beginning of the text; None while that is too short to decide."""
        head = self._text_head
        if len(head) < _MAGIC_BYTES and not is_whole:
            return None
        _refuse_foreign(head, _FOREIGN_FILES + (_INSIDE_GZIP if self._gunzip else ()))
        text = head.removeprefix(_BOM).lstrip(_SPACES)
        is_enough = is_whole or len(head) > _MAX_HEADER_BYTES
        if text.startswith(b"["):
            return JsonArrayReader(self._limits)
        if text.startswith(b"{"):
            return JsonLinesReader(self._limits)
        if not is_enough and b"\n" not in text:
            return None
        line = text.split(b"\n", 1)[0].removesuffix(b"\r")
        is_table = len(line) <= _MAX_HEADER_BYTES and find_header(line) is not None
        return CsvReader(self._limits) if is_table else JsonLinesReader(self._limits)

    def finish(self) -> Iterator[RawRow | Fault]:
        """Yield the remaining rows or faults; no more bytes follow.

        Raises:
            InvalidFileFormatError: when the file holds no rows, or was cut.
        """
        if not self._is_decided:
            yield from self._feed_decided(self._decide())
        if self.is_parquet:
            return
        if self._gunzip is not None:
            self._gunzip.finish()
        if self._reader is None:
            self._reader = self._find_reader(is_whole=True)
            assert self._reader is not None
            yield from self._reader.feed(self._text_head)
        yield from self._reader.finish()
