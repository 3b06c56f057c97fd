"""The process that makes a report: `python -m luthier.data.reports.process`, by `report_in_process`.

A report takes a core for up to a minute, which a server can't spare. The process gets the paths of the files
and the base and nothing else: no settings, no secrets.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from luthier.core.errors import BaseUnavailableError, InvalidFileFormatError, UnavailableError
from luthier.core.runtime import bare_environment
from luthier.core.specs import Frozen
from luthier.data.answers import Refusal, read_answer, write_answer
from luthier.data.reports.file_report import DataReport
from luthier.data.reports.report import report_on_file

# A process that has not ended this long after its deadline is killed.
_GRACE_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_REFUSALS: dict[str, type[Exception]] = {
    one.__name__: one for one in (BaseUnavailableError, InvalidFileFormatError, FileNotFoundError)
}


class _Question(Frozen):
    path: Path
    base_folder: Path
    context_length: int
    validation_path: Path | None
    max_seconds: float


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
    question = _Question(
        path=path,
        base_folder=base_folder,
        context_length=context_length,
        validation_path=validation_path,
        max_seconds=max_seconds,
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, question.model_dump_json()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=bare_environment() | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        try:
            content = _wait(process, time.monotonic() + max_seconds + _GRACE_SECONDS, is_given_up)
        finally:
            process.kill()
    found = read_answer(content, DataReport, "read")
    if not isinstance(found, Refusal):
        return found
    refusal = _REFUSALS[found.error_type]
    raise refusal(found.message) if found.message else refusal


def _wait(process: subprocess.Popen[bytes], deadline: float, is_given_up: Callable[[], bool]) -> bytes:
    while time.monotonic() < deadline and not is_given_up():
        try:
            return process.communicate(timeout=_LOOK_SECONDS)[0]
        except subprocess.TimeoutExpired:
            continue
    raise UnavailableError("The report was given up: its client is gone, or its rows take too long.")


def main() -> None:
    question = _Question.model_validate_json(sys.argv[1])
    write_answer(lambda: report_on_file(**dict(question)), tuple(_REFUSALS.values()))


if __name__ == "__main__":
    main()
