"""The check of a file of rows while its bytes arrive: counts and faults with constant memory.

It finds what the text alone shows; faults that need a template or a tokenizer are found by prepare.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from luthier.core.errors import InvalidFileFormatError
from luthier.data.formats.base import Fault, summarize_faults
from luthier.data.readers.base import Limits
from luthier.data.readers.file_rows import FileRows
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


def check_rows(chunks: Iterable[bytes], limits: Limits, path: Path | None = None) -> FileFacts:
    """Check the bytes of a file, which come in chunks of any size.

    Args:
        path: the whole file, without which Parquet can't be read.

    Raises:
        InvalidFileFormatError: when a row has a fault, of which the first 20 are listed; when there is no
            row; or when the file holds none, is damaged, or has more than the limits allow.
    """
    num_bytes = num_rows = 0

    def counted() -> Iterator[bytes]:
        nonlocal num_bytes
        for chunk in chunks:
            num_bytes += len(chunk)
            yield chunk

    stream = RowStream(counted(), limits, path)
    rows = FileRows(stream)
    faults: list[Fault] = []
    for item in rows.raw():
        if isinstance(item, Fault):
            faults.append(item)
        else:
            num_rows += 1
            _check_number(num_rows, limits)
            faults += rows.check(item)
        if len(faults) >= MAX_FAULTS:
            break
    if faults:
        raise _error(faults[:MAX_FAULTS])
    if num_rows == 0 or rows.format is None:
        raise InvalidFileFormatError(
            'The file is empty. Write one JSON object a line, such as {"messages": [...]}.', param="file"
        )
    if path is not None:
        num_bytes = path.stat().st_size
    return FileFacts(num_rows, num_bytes, rows.format.name, stream.container)


def _check_number(num_rows: int, limits: Limits) -> None:
    if num_rows > limits.max_rows:
        raise InvalidFileFormatError(
            f"The file has more than {limits.max_rows} rows, the limit of one file; split it, or ask the "
            "operator to raise LUTHIER_MAX_TRAINING_ROWS.",
            param="file",
        )
    if num_rows * _MIN_ROW_BYTES > limits.max_expanded_bytes:
        raise InvalidFileFormatError(
            f"The file has more than {num_rows - 1} rows; split it, or ask the operator to raise "
            "LUTHIER_MAX_EXPANDED_BYTES.",
            param="file",
        )


def _error(faults: list[Fault]) -> InvalidFileFormatError:
    if len(faults) == 1:
        return InvalidFileFormatError(str(faults[0]), param="file")
    count = f"{MAX_FAULTS} or more" if len(faults) == MAX_FAULTS else str(len(faults))
    return InvalidFileFormatError(
        f"The file breaks the format in {count} places. {summarize_faults(faults)}",
        param="file",
        faults=[str(fault) for fault in faults],
    )
