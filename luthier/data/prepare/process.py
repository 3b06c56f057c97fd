"""The process that prepares a job's files: `python -m luthier.data.prepare.process FOLDER`.

It may be killed at any moment, has a limit of memory, and gets no secret. FOLDER holds question.json and
the files as `training` and `validation`; the process leaves answer.json and the prepared rows there, and
writes a line to standard output at intervals while it makes progress.
"""

import errno
import resource
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from luthier.core.errors import InvalidTrainingFileError, LuthierError, OutOfMemoryError, StorageFullError
from luthier.core.specs import MIN_TRAINING_ROWS, TooLong
from luthier.data.prepare.objectives import Purpose
from luthier.data.prepare.preparation import PreparedReport, RowLimits, prepare_rows
from luthier.data.prepare.prepared_rows import PreparedRows, write_prepared
from luthier.data.prepare.validation_split import split_rows

QUESTION_NAME, ANSWER_NAME, ROWS_FOLDER = "question.json", "answer.json", "building"
TRAIN_FILE = "train.safetensors"
VALIDATION_FILE = "validation.safetensors"
_PROGRESS_SECONDS = 0.5


class Question(msgspec.Struct):
    """The job's files and their limits. `validation_split` is 0 where no rows are held back."""

    base_folder: str
    max_length: int
    too_long: TooLong
    has_pairs: bool
    validation_split: float
    has_validation_file: bool
    limits: RowLimits
    max_memory_bytes: int


class Prepared(msgspec.Struct):
    """The outcome: reports on the files, and the rows of each side that are used."""

    training: PreparedReport
    validation: PreparedReport | None
    num_train_rows: int
    num_train_tokens: int
    num_validation_rows: int
    tokenize_seconds: float


class Failure(msgspec.Struct):
    """A LuthierError by its code."""

    code: str | None
    message: str
    param: str | None


class Answer(msgspec.Struct):
    prepared: Prepared | None = None
    failure: Failure | None = None


def main(folder: Path) -> None:
    question = msgspec.json.decode((folder / QUESTION_NAME).read_bytes(), type=Question)
    # What grows with the rows is in unnamed files too (prepared_rows.py), which vanish with the process.
    tempfile.tempdir = str(folder)
    # Beyond the interpreter and its libraries, whose size depends on the machine.
    taken_bytes = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (taken_bytes + question.max_memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = Answer(prepared=_prepare(question, folder))
    except LuthierError as error:
        answer = Answer(failure=_failure(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        answer = Answer(failure=_failure(StorageFullError("The worker's disk is full.")))
    except MemoryError:
        answer = Answer(failure=_failure(out_of_memory(question.max_memory_bytes)))
    (folder / ANSWER_NAME).write_bytes(msgspec.json.encode(answer))


def _failure(error: LuthierError) -> Failure:
    return Failure(error.code, error.message, error.param)


def out_of_memory(max_bytes: int) -> OutOfMemoryError:
    """Return the error of files whose preparation needs more memory than allowed."""
    return OutOfMemoryError(
        f"The job's files take more than {max_bytes / 1e9:.1f} GB of memory to prepare "
        "(LUTHIER_MAX_PREPARE_BYTES). Send fewer rows, or a validation_file instead of "
        "training.validation_split.",
        param="training_file",
    )


def _prepare(question: Question, folder: Path) -> Prepared:
    per_example = 2 if question.has_pairs else 1
    began = time.monotonic()
    train, found = _read(question, folder, "training")
    validation, validation_found = None, None
    if question.has_validation_file:
        validation, validation_found = _read(question, folder, "validation")
    tokenize_seconds = time.monotonic() - began
    if validation is None and question.validation_split > 0:
        train, validation = split_rows(train, question.validation_split, rows_per_example=per_example)
    num_examples = train.num_rows // per_example
    if num_examples < MIN_TRAINING_ROWS:
        raise InvalidTrainingFileError(
            f"Only {num_examples} rows are left to train on, and a job needs at least {MIN_TRAINING_ROWS}.",
            param="training_file",
        )
    building = folder / ROWS_FOLDER
    building.mkdir()
    write_prepared(train, building / TRAIN_FILE)
    if validation is not None:
        write_prepared(validation, building / VALIDATION_FILE)
    return Prepared(
        training=found,
        validation=validation_found,
        num_train_rows=num_examples,
        num_train_tokens=train.num_tokens,
        num_validation_rows=0 if validation is None else validation.num_rows // per_example,
        tokenize_seconds=tokenize_seconds,
    )


def _read(question: Question, folder: Path, purpose: Purpose) -> tuple[PreparedRows, PreparedReport]:
    spoke_at = 0.0

    def note_progress() -> None:
        nonlocal spoke_at
        if time.monotonic() - spoke_at >= _PROGRESS_SECONDS:
            spoke_at = time.monotonic()
            sys.stdout.write("\n")
            sys.stdout.flush()

    return prepare_rows(
        folder / purpose,
        Path(question.base_folder),
        max_length=question.max_length,
        too_long=question.too_long,
        purpose=purpose,
        with_signatures=purpose == "training" and question.validation_split > 0,
        wants_pairs=question.has_pairs,
        limits=question.limits,
        note_progress=note_progress,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
