"""The check of a file of rows while its bytes arrive: counts and faults with constant memory.

It finds what the text alone shows; faults that need a template or a tokenizer are found by prepare.
"""

from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from luthier.core.errors import InvalidFileFormatError
from luthier.data.formats.base import Fault, RowFormat, summarize_faults
from luthier.data.readers.base import Limits, RawRow
from luthier.data.readers.detect_format import detect_format, explain_row
from luthier.data.readers.file_rows import locate
from luthier.data.readers.parquet import read_parquet
from luthier.data.readers.stream import RowStream

MAX_FAULTS = 20
# A row counts as at least this many bytes of what a file may hold: checking and reading it costs as much.
_MIN_ROW_BYTES = 200


class FileFacts(NamedTuple):
    """What is known of a checked file.

    `format` is that of its rows, None where they were not checked; `container` such as `jsonl` or `csv+gzip`.
    """

    num_rows: int
    num_bytes: int
    format: str | None = None
    container: str = "jsonl"


class FileChecker:
    """Checks a file fed in chunks of any size; the result does not depend on where they were cut.

    A Parquet file can be read only once it is whole: then `needs_file` is True, and `finish` is given its
    path.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._format: RowFormat | None = None
        self._stream = RowStream(self._limits)
        self._num_bytes = 0
        self._num_rows = 0
        self._faults: list[Fault] = []

    @property
    def needs_file(self) -> bool:
        """Whether the file is Parquet, which `finish` reads as a whole."""
        return self._stream.is_parquet

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes.

        Raises:
            InvalidFileFormatError: once the file is known to hold no rows, or has 20 faults.
        """
        self._num_bytes += len(chunk)
        for item in self._stream.feed(chunk):
            self._take(item)

    def finish(self, path: Path | None = None) -> FileFacts:
        """Return the facts of the file, all of which was fed; `path` is needed where `needs_file` is True.

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
        self._num_bytes = path.stat().st_size
        with closing(read_parquet(path, self._limits)) as items:
            for item in items:
                self._take(item)

    def _take(self, item: RawRow | Fault) -> None:
        if isinstance(item, Fault):
            self._add(item)
            return
        self._num_rows += 1
        if self._num_rows > self._limits.max_rows:
            raise InvalidFileFormatError(
                f"The file has more than {self._limits.max_rows} rows, the limit of one file; split it, or "
                "ask the operator to raise LUTHIER_MAX_TRAINING_ROWS.",
                param="file",
            )
        if self._num_rows * _MIN_ROW_BYTES > self._limits.max_expanded_bytes:
            raise InvalidFileFormatError(
                f"The file has more than {self._num_rows - 1} rows; split it, or ask the operator to raise "
                "LUTHIER_MAX_EXPANDED_BYTES.",
                param="file",
            )
        if self._format is None:
            found = detect_format(item.content, item.number)
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
            f"The file breaks the format in {count} places. {summarize_faults(self._faults)}",
            param="file",
            faults=[str(fault) for fault in self._faults],
        )
