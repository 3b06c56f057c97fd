"""`luthier check`: checks a training file's format offline, by the code that checks uploads."""

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from luthier.core.errors import InvalidFileFormatError, InvalidValueError

_CHUNK_BYTES = 1024 * 1024


def check(file: Annotated[Path, typer.Argument(help="Training file, one JSON object a line.")]) -> None:
    """Check a training file's format on this machine, before any upload."""
    from luthier.cli.settings import read_settings
    from luthier.core.specs import MIN_TRAINING_ROWS
    from luthier.data.readers.file_checker import MAX_FAULTS, FileChecker
    from luthier.data.readers.upload_check import row_limits

    checker = FileChecker(row_limits(read_settings()))
    sha256 = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                sha256.update(chunk)
                checker.feed(chunk)
        facts = checker.finish(file)
    except OSError as error:
        raise InvalidValueError(f"{file} can't be read: {error.strerror}.") from error
    except InvalidFileFormatError as error:
        if len(error.faults) < 2:
            raise
        count = f"{MAX_FAULTS} or more" if len(error.faults) == MAX_FAULTS else len(error.faults)
        listed = "\n".join(error.faults)
        raise InvalidFileFormatError(
            f"{file} breaks the format in {count} places:\n{listed}", param="file"
        ) from error
    print(
        f"{file}: {facts.num_rows} rows of the format {facts.format} in {facts.container}, "
        f"{facts.num_bytes} bytes, sha256 {sha256.hexdigest()}"
    )
    if facts.num_rows < MIN_TRAINING_ROWS:
        print(
            f"These are too few to train on: a job needs at least {MIN_TRAINING_ROWS} rows. As a validation "
            "file it will do."
        )
