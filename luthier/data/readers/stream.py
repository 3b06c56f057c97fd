"""Rows of a stream of bytes in any container, which is detected by its content.

A file's name and type are not used: clients send both wrong.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path

from luthier.core.errors import InvalidFileFormatError
from luthier.data.formats.base import Fault
from luthier.data.readers import gzip_stream, parquet
from luthier.data.readers.base import Limits, RawRow
from luthier.data.readers.csv_table import find_header, read_csv
from luthier.data.readers.json_array import JsonArrayReader
from luthier.data.readers.json_lines import read_json_lines

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
    """The rows of a stream, or faults instead of them, as an iterable.

    `path` is the file that the stream is of: Parquet can be read only from a whole one. `container` is what
    the stream is, such as `jsonl` or `csv+gzip`; empty until the first row.
    """

    def __init__(self, chunks: Iterable[bytes], limits: Limits, path: Path | None = None) -> None:
        self._chunks, self._limits, self._path = iter(chunks), limits, path
        self.container = ""

    def __iter__(self) -> Iterator[RawRow | Fault]:
        """Yield the rows.

        Raises:
            InvalidFileFormatError: when the file holds no rows, is damaged or expands beyond the limits.
        """
        head, chunks = _read_head(self._chunks, lambda head: len(head) >= _MAGIC_BYTES)
        if head.startswith(parquet.MAGIC):
            self.container = "parquet"
            yield from self._read_parquet()
            return
        is_packed = head.startswith(gzip_stream.MAGIC)
        if is_packed:
            chunks = gzip_stream.gunzip(chunks, self._limits)
        head, chunks = _read_head(chunks, _shows_container)
        _refuse_foreign(head, _FOREIGN_FILES + (_INSIDE_GZIP if is_packed else ()))
        name = _name_text(head)
        self.container = f"{name}+gzip" if is_packed else name
        if name == "json":
            yield from JsonArrayReader(self._limits).read(chunks)
        else:
            yield from (read_csv if name == "csv" else read_json_lines)(chunks, self._limits)

    def _read_parquet(self) -> Iterator[RawRow | Fault]:
        if self._path is None:
            raise InvalidFileFormatError(
                "The file is Parquet, which can't be checked as it comes here; send JSON lines.", param="file"
            )
        with closing(parquet.read_parquet(self._path, self._limits)) as rows:
            yield from rows


def _read_head(chunks: Iterator[bytes], is_enough: Callable[[bytes], bool]) -> tuple[bytes, Iterator[bytes]]:
    """Return the beginning of a stream, as much as is needed or there is; and the whole stream."""
    head = b""
    for chunk in chunks:
        head += chunk
        if is_enough(head):
            break
    return head, itertools.chain([head], chunks)


def _shows_container(head: bytes) -> bool:
    """Whether the beginning of a text shows what it is: its first character, or its whole first line."""
    if len(head) < _MAGIC_BYTES:
        return False
    text = head.removeprefix(_BOM).lstrip(_SPACES)
    return text.startswith((b"[", b"{")) or b"\n" in text or len(head) > _MAX_HEADER_BYTES


def _name_text(head: bytes) -> str:
    """Return what a text is: a JSON array, a table, or JSON lines."""
    text = head.removeprefix(_BOM).lstrip(_SPACES)
    if text.startswith(b"["):
        return "json"
    line = text.split(b"\n", 1)[0].removesuffix(b"\r")
    is_table = not text.startswith(b"{") and len(line) <= _MAX_HEADER_BYTES and find_header(line) is not None
    return "csv" if is_table else "jsonl"
