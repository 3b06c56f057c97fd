"""The process that checks a file's rows: `python -m luthier.data.readers.check_process`, by `CheckProcess`.

Reading JSON holds the GIL, which the event loop needs. The process gets the file on stdin, or its path,
and nothing else: no settings, no secrets. It answers with one line, and ends with its parent, whose end
closes its pipes.
"""

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from luthier.core.errors import InvalidFileFormatError, UnavailableError
from luthier.core.runtime import bare_environment
from luthier.data.answers import Refusal, read_answer, write_answer
from luthier.data.readers.base import Limits
from luthier.data.readers.file_checker import FileFacts, check_rows
from luthier.data.readers.file_rows import read_chunks

_READ_BYTES = 256 * 1024
# A check beside an inference server would delay the slowest thread of each step.
_NICENESS = 5


class _Question(msgspec.Struct):
    """The limits of the file, and its path when it does not come on stdin."""

    limits: Limits
    path: str | None


class CheckProcess:
    """One process that checks one file: the one at `path`, or what it is fed.

    Its methods block; `kill` may be called from another thread.
    """

    def __init__(self, limits: Limits, path: Path | None) -> None:
        question = msgspec.json.encode(_Question(limits, None if path is None else str(path)))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "luthier.data.readers.check_process", question.decode()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=bare_environment(),
                # A Ctrl-C is for the parent, which may finish what it received.
                start_new_session=True,
            )
        except OSError as error:
            raise UnavailableError(
                "No process could be started to check the file's rows; try again. Operator: the machine is "
                "short of memory, or of processes."
            ) from error
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        self._input, self._output = self._process.stdin, self._process.stdout

    def feed(self, chunk: bytes) -> None:
        """Send the next bytes.

        Raises:
            InvalidFileFormatError: when the process has already refused the file.
            UnavailableError: when it has ended without an answer.
        """
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[self._input.write(rest) :]
        except BrokenPipeError:
            self.finish()

    def finish(self) -> FileFacts:
        """Wait for the answer.

        Raises:
            InvalidFileFormatError: when the file breaks its format.
            UnavailableError: when the process has ended without an answer.
            RuntimeError: when it failed unexpectedly; names kind and place.
        """
        self._input.close()
        found = read_answer(self._output.read(), FileFacts, "checked")
        if isinstance(found, Refusal):
            raise InvalidFileFormatError(found.message, param="file")
        return found

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Kill the process and close its pipes; no other thread may use it any more."""
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()


def _check(question: _Question) -> FileFacts:
    if question.path is not None:
        path = Path(question.path)
        return check_rows(read_chunks(path), question.limits, path)
    return check_rows(iter(lambda: os.read(sys.stdin.fileno(), _READ_BYTES), b""), question.limits)


def main() -> None:
    os.nice(_NICENESS)
    question = msgspec.json.decode(sys.argv[1], type=_Question)
    write_answer(lambda: _check(question), (InvalidFileFormatError,))


if __name__ == "__main__":
    main()
