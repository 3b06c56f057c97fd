"""The process that makes a report: `python -m luthier.data.reports.process`, by `report_in_process`.

A report takes a core for up to a minute, which a server can't spare. The process gets the paths of the files
and the base and nothing else: no settings, no secrets.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from luthier.core.errors import (
    BaseUnavailableError,
    InvalidFileFormatError,
    LuthierError,
    UnavailableError,
)
from luthier.core.logs import origin
from luthier.core.runtime import bare_environment
from luthier.core.specs import Frozen
from luthier.data.reports.file_report import DataReport
from luthier.data.reports.report import report_on_file

# A process that has not ended this long after its deadline is killed.
_GRACE_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_REFUSALS: tuple[type[LuthierError], ...] = (BaseUnavailableError, InvalidFileFormatError)


class _Question(msgspec.Struct):
    path: str
    base_folder: str
    context_length: int
    validation_path: str | None
    max_seconds: float


class _Answer(Frozen):
    """A report; or an error of the file or base; or where an unexpected error was raised.

    `error_type` is the name of the error's class. An unexpected error has no text: it may quote a row.
    """

    report: DataReport | None = None
    error_type: str = ""
    message: str = ""
    raised_at: str = ""


def report_in_process(
    path: Path,
    base_folder: Path,
    *,
    context_length: int,
    validation_path: Path | None,
    max_seconds: float,
    is_given_up: Callable[[], bool],
) -> DataReport:
    """Report on a file as `report_on_file` does, in a process.

    Args:
        is_given_up: polled; once the client is gone the process is killed.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
        InvalidFileFormatError: when a file holds no rows.
        FileNotFoundError: when a file is gone.
        UnavailableError: when the client is gone, or the process has ended.
        RuntimeError: after an unexpected error; names kind and place.
    """
    validation = None if validation_path is None else str(validation_path)
    question = _Question(str(path), str(base_folder), context_length, validation, max_seconds)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, msgspec.json.encode(question).decode()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=bare_environment() | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        try:
            content = _wait(process, time.monotonic() + max_seconds + _GRACE_SECONDS, is_given_up)
        finally:
            process.kill()
    return _read(content)


def _wait(process: subprocess.Popen[bytes], deadline: float, is_given_up: Callable[[], bool]) -> bytes:
    while time.monotonic() < deadline and not is_given_up():
        try:
            return process.communicate(timeout=_LOOK_SECONDS)[0]
        except subprocess.TimeoutExpired:
            continue
    raise UnavailableError("The report was given up: its client is gone, or its rows take too long.")


def _read(content: bytes) -> DataReport:
    if not content:
        raise UnavailableError(
            "The process that read the file's rows has ended; try again. Operator: see whether the machine "
            "is short of memory."
        )
    answer = _Answer.model_validate_json(content)
    if answer.report is not None:
        return answer.report
    for refusal in _REFUSALS:
        if refusal.__name__ == answer.error_type:
            raise refusal(answer.message)
    if answer.error_type == FileNotFoundError.__name__:
        raise FileNotFoundError
    raise RuntimeError(f"A report's process failed with {answer.error_type} at {answer.raised_at}.")


def _answer(question: _Question) -> _Answer:
    try:
        report = report_on_file(
            Path(question.path),
            Path(question.base_folder),
            context_length=question.context_length,
            validation_path=None if question.validation_path is None else Path(question.validation_path),
            max_seconds=question.max_seconds,
        )
    except _REFUSALS as error:
        return _Answer(error_type=type(error).__name__, message=error.message)
    except Exception as error:  # noqa: BLE001 - the parent raises it; a traceback could quote a row
        found = origin(error)
        return _Answer(error_type=found["error_type"], raised_at=found["raised_at"])
    return _Answer(report=report)


def main() -> None:
    """Write the answer on stdout."""
    answer = _answer(msgspec.json.decode(sys.argv[1], type=_Question))
    sys.stdout.buffer.write(answer.model_dump_json().encode())
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
