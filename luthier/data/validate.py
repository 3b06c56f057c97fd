"""Checking a file of rows while its bytes stream by: counts and faults with constant memory.

Only what can be told from the text alone; what needs a template or a tokenizer is found by prepare.
"""

from pathlib import Path
from typing import NamedTuple

from luthier.core.errors import InvalidFileFormatError
from luthier.data.containers.base import Limits, RawRow
from luthier.data.containers.parquet import read_parquet
from luthier.data.containers.stream import RowStream
from luthier.data.formats.base import Fault, RowFormat, tell_faults
from luthier.data.recognise import explain_row, recognise
from luthier.data.rows import locate

MAX_FAULTS = 20


class FileFacts(NamedTuple):
    """What is known of a checked file.

    `format` is how its rows are written, None where nobody looked at rows; `container` how they lie in it,
    such as `jsonl` or `csv+gzip`.
    """

    num_rows: int
    num_bytes: int
    format: str | None = None
    container: str = "jsonl"


class FileChecker:
    """Check a file fed in chunks of any size; the result does not depend on where they were cut.

    Container and format are told by the content. A Parquet file can be read only once it is whole: then
    `needs_file` is True, and `finish` is given its path.

    Args:
        max_line_bytes: longest row, its newline not counted; longer ones are a fault and not kept.
        max_expanded_bytes: what a compressed file may expand to.
        max_expansion_ratio: the same as a multiple of its size, beyond the first 16 MiB.
        row_format: the format that all rows must have; the first row's when None.
    """

    def __init__(
        self,
        *,
        max_line_bytes: int = 8 * 1024 * 1024,
        max_expanded_bytes: int = 8 * 1024 * 1024 * 1024,
        max_expansion_ratio: float = 100.0,
        row_format: RowFormat | None = None,
    ) -> None:
        self._limits = Limits(max_line_bytes, max_expanded_bytes, max_expansion_ratio)
        self._format = row_format
        self._stream = RowStream(self._limits)
        self._num_bytes = 0
        self._num_rows = 0
        self._faults: list[Fault] = []

    @property
    def needs_file(self) -> bool:
        """Whether what came is Parquet, which `finish` reads from the whole file."""
        return self._stream.is_parquet

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Args:
            chunk: any number of bytes.

        Raises:
            InvalidFileFormatError: once the file is known to be none of rows, or has 20 faults.
        """
        self._num_bytes += len(chunk)
        for item in self._stream.feed(chunk):
            self._take(item)

    @property
    def takes_plain_rows(self) -> bool:
        """Whether these are lines of chat rows as they are, and the next byte begins one."""
        is_chat = self._format is not None and self._format.name == "chat"
        return is_chat and self._stream.is_between_lines

    def take_lines(self, lines: bytes, num_plain_rows: int | None) -> None:
        """Take the next bytes, whole lines all: what is plainly written was judged at once.

        Args:
            lines: each with its line end.
            num_plain_rows: what `count_plain_rows` says of them.

        Raises:
            InvalidFileFormatError: as `feed` does.
        """
        is_short = len(lines) <= self._limits.max_row_bytes
        if num_plain_rows is None or not is_short or not self.takes_plain_rows:
            self.feed(lines)
            return
        self._num_bytes += len(lines)
        self._num_rows += num_plain_rows
        self._stream.skip_lines(num_plain_rows)

    def finish(self, path: Path | None = None) -> FileFacts:
        """Say that no more bytes follow.

        Args:
            path: the whole file, which is read where `needs_file` is True.

        Returns:
            Rows, bytes, format and container of the file.

        Raises:
            InvalidFileFormatError: when any row has a fault, or there is none.
        """
        for item in self._stream.finish():
            self._take(item)
        if self.needs_file:
            self._read_whole(path)
        if self._faults:
            raise self._error()
        if self._num_rows == 0 or self._format is None:
            raise InvalidFileFormatError(
                'The file is empty. Write one JSON object a line, such as {"messages": [...]}.', param="file"
            )
        return FileFacts(
            num_rows=self._num_rows,
            num_bytes=self._num_bytes,
            format=self._format.name,
            container=self._stream.container,
        )

    def _read_whole(self, path: Path | None) -> None:
        if path is None:
            raise InvalidFileFormatError(
                "The file is Parquet, which can't be checked as it comes here; send JSON lines.", param="file"
            )
        for item in read_parquet(path, self._limits):
            self._take(item)

    def _take(self, item: RawRow | Fault) -> None:
        if isinstance(item, Fault):
            self._add(item)
            return
        self._num_rows += 1
        if self._format is None:
            found = recognise(item.content, item.number)
            if isinstance(found, Fault):
                self._add(locate(found, item))
                return
            self._format = found
        if not self._format.accepts(item.content):
            for fault in explain_row(self._format, item.content, item.number):
                self._add(locate(fault, item))

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
            f"The file breaks the format in {count} places. {tell_faults(self._faults)}",
            param="file",
            faults=[str(fault) for fault in self._faults],
        )
