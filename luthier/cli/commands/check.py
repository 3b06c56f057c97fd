"""`luthier check`: a training file's format, offline, by the same code that checks an upload."""

import hashlib
from pathlib import Path

from luthier.cli.settings import read_settings
from luthier.core.errors import InvalidFileFormatError, InvalidValueError
from luthier.core.specs import MIN_TRAINING_ROWS

_CHUNK_BYTES = 1024 * 1024


def check_file(path: Path) -> None:
    """Check a file and print its facts.

    Raises:
        InvalidValueError: when it can't be read.
        InvalidFileFormatError: when it breaks the format; names line, column and rule of every fault found.
    """
    from luthier.data.readers.file_checker import MAX_FAULTS, FileChecker
    from luthier.data.readers.upload_check import row_limits

    checker = FileChecker(row_limits(read_settings()))
    sha256 = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                sha256.update(chunk)
                checker.feed(chunk)
        facts = checker.finish(path)
    except OSError as error:
        raise InvalidValueError(f"{path} can't be read: {error.strerror}.") from error
    except InvalidFileFormatError as error:
        if len(error.faults) < 2:
            raise
        count = f"{MAX_FAULTS} or more" if len(error.faults) == MAX_FAULTS else len(error.faults)
        listed = "\n".join(error.faults)
        raise InvalidFileFormatError(
            f"{path} breaks the format in {count} places:\n{listed}", param="file"
        ) from error
    print(
        f"{path}: {facts.num_rows} rows of the format {facts.format} in {facts.container}, "
        f"{facts.num_bytes} bytes, sha256 {sha256.hexdigest()}"
    )
    if facts.num_rows < MIN_TRAINING_ROWS:
        print(
            f"These are too few to train on: a job needs at least {MIN_TRAINING_ROWS} rows. As a validation "
            "file it will do."
        )
