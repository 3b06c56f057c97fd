"""Rows of a large file examined by a few processes, in the file's order; those of a small one here.

The processes are started afresh (`python -m luthier.data.examiners BASE_FOLDER`): a service with threads must
not fork. They have pipes and nothing else, and end when those are closed, as by a parent that is gone.
"""

import contextlib
import functools
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import msgspec

from luthier.core.errors import BaseUnavailableError, UnavailableError
from luthier.core.logs import origin
from luthier.core.process import bare_environment
from luthier.data.examine import Batch, Examined, Examiner

# The one that counts and compares has work for as many.
_MAX_PROCESSES = 6
# A file below this is examined in the time that processes take to start.
_MIN_BYTES = 4 * 1024 * 1024
_LENGTH = struct.Struct("<Q")


def num_processes_for(*paths: Path) -> int:
    """Return how many processes examine files, by the largest: 0 where it is done here."""
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2 or max(path.stat().st_size for path in paths) < _MIN_BYTES:
        return 0
    return min(num_cores, _MAX_PROCESSES)


class Examiners:
    """Examine batches here or in processes; what is found is the same. A context: its end is theirs.

    Args:
        num_processes: how many; 0 for none.
    """

    def __init__(self, base_folder: Path, num_processes: int) -> None:
        self._base_folder = base_folder
        self._num_processes = num_processes
        self._processes: list[_Process] = []
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._threads = ThreadPoolExecutor(max(1, num_processes), "examiner")

    def __enter__(self) -> "Examiners":
        try:
            for _ in range(self._num_processes):
                self._processes.append(_Process(self._base_folder))
                self._idle.put(self._processes[-1])
        except OSError as error:
            self._end()
            raise UnavailableError(
                "No process could be started to read the file's rows; try again. Operator: the machine is "
                "short of memory, or of processes."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def examine(self, batches: Iterator[Batch]) -> Iterator[Examined]:
        """Yield what is found of each batch, in order; few are taken ahead.

        Yields:
            What was found.

        Raises:
            BaseUnavailableError: when the base has no template or tokenizer that can be read.
            UnavailableError: when a process has ended, for want of memory perhaps.
            RuntimeError: when examining failed in a process as nobody expected; names kind and place.
        """
        if not self._processes:
            yield from map(self._here.examine, batches)
            return
        waiting: deque[Future[Examined]] = deque()
        for batch in batches:
            waiting.append(self._threads.submit(self._examine_apart, batch))
            if len(waiting) > 2 * len(self._processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @functools.cached_property
    def _here(self) -> Examiner:
        return Examiner(self._base_folder)

    def _examine_apart(self, batch: Batch) -> Examined:
        process = self._idle.get()
        try:
            return process.examine(batch)
        finally:
            self._idle.put(process)


class _Answer(msgspec.Struct, array_like=True):
    """What a process says of a batch, and first of itself: an empty answer where it can work.

    `refusal` says what is wrong with the base. `error_type` and `raised_at` are of a fault of our own; its
    text stays in the process, since it may quote a row.
    """

    examined: Examined | None = None
    refusal: str = ""
    error_type: str = ""
    raised_at: str = ""


_BATCHES = msgspec.msgpack.Decoder(Batch)
_ANSWERS = msgspec.msgpack.Decoder(_Answer)


class _Process:
    def __init__(self, base_folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.data.examiners", str(base_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=bare_environment() | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._is_ready = False

    def examine(self, batch: Batch) -> Examined:
        try:
            if not self._is_ready:
                self._take_answer()
                self._is_ready = True
            _write(self._input, msgspec.msgpack.encode(batch))
            examined = self._take_answer().examined
        except (OSError, EOFError) as error:
            raise UnavailableError(
                "A process that read the file's rows has ended; try again. Operator: see the log, and "
                "whether the machine is short of memory."
            ) from error
        if examined is None:
            raise RuntimeError("A process that examines rows gave an empty answer to a batch.")
        return examined

    def _take_answer(self) -> _Answer:
        answer = _ANSWERS.decode(_read(self._output))
        if answer.refusal:
            raise BaseUnavailableError(answer.refusal)
        if answer.error_type:
            raise RuntimeError(
                f"A process that examines rows failed with {answer.error_type} at {answer.raised_at}."
            )
        return answer

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        self._output.close()
        with contextlib.suppress(BrokenPipeError):
            # What was not yet written is of no use to it.
            self._input.close()


def _write(target: IO[bytes], content: bytes) -> None:
    target.write(_LENGTH.pack(len(content)))
    target.write(content)
    target.flush()


def _read(source: IO[bytes]) -> bytes:
    """Read one message; EOFError when there is none, or not all of it."""
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    [num_bytes] = _LENGTH.unpack(head)
    content = source.read(num_bytes)
    if len(content) < num_bytes:
        raise EOFError
    return content


def _tell(error: Exception) -> _Answer:
    told = origin(error)
    return _Answer(error_type=told["error_type"], raised_at=told["raised_at"])


def _serve(base_folder: Path) -> None:
    # What anything prints must not get among the answers.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with contextlib.suppress(EOFError, BrokenPipeError):
        # The parent's end of a pipe is gone: so is the work.
        try:
            examiner = Examiner(base_folder)
        except BaseUnavailableError as error:
            _write(output, msgspec.msgpack.encode(_Answer(refusal=error.message)))
            return
        except Exception as error:  # noqa: BLE001 - the parent raises it
            _write(output, msgspec.msgpack.encode(_tell(error)))
            return
        _write(output, msgspec.msgpack.encode(_Answer()))
        while True:
            content = _read(sys.stdin.buffer)
            try:
                answer = msgspec.msgpack.encode(_Answer(examiner.examine(_BATCHES.decode(content))))
            except Exception as error:  # noqa: BLE001 - the parent raises it; a traceback could quote a row
                answer = msgspec.msgpack.encode(_tell(error))
            _write(output, answer)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
