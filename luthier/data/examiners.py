"""Rows of a large file examined by a few processes, in the file's order; those of a small one here.

The processes are Python's own, started afresh (`python -m luthier.data.examiners BASE_FOLDER`): a service with
threads must not fork. They have pipes alone, and end when the pipe is closed or the parent is gone.
"""

import contextlib
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

from luthier.core.errors import UnavailableError
from luthier.data.examine import Batch, Examined, Examiner

# The one that counts and compares has work for as many.
_MAX_PROCESSES = 6
# A file below this is examined in the time that processes take to start.
_MIN_BYTES = 8 * 1024 * 1024
_LENGTH = struct.Struct("<Q")
# No secret of a service is among what a process that reads rows knows.
_ALLOWED_VARIABLES = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH"}
)


def num_processes_for(path: Path) -> int:
    """Return how many processes examine a file: 0 where it is done here."""
    num_cores = len(os.sched_getaffinity(0))
    if num_cores < 2 or path.stat().st_size < _MIN_BYTES:
        return 0
    return min(num_cores, _MAX_PROCESSES)


class Examiners:
    """Examine batches here or in processes; what is found is the same. A context, which ends them.

    Args:
        base_folder: a fetched base.
        num_processes: how many; 0 for none.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
    """

    def __init__(self, base_folder: Path, num_processes: int) -> None:
        self._here = Examiner(base_folder)
        self._idle: SimpleQueue[_Process] = SimpleQueue()
        self._processes: list[_Process] = []
        self._threads = ThreadPoolExecutor(max(1, num_processes), "examiner")
        for _ in range(num_processes):
            self._processes.append(_Process(base_folder))
            self._idle.put(self._processes[-1])

    def __enter__(self) -> "Examiners":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def examine(self, batches: Iterator[Batch]) -> Iterator[Examined]:
        """Yield what is found of each batch, in order; few are taken ahead.

        Args:
            batches: the rows.

        Yields:
            What was found.

        Raises:
            UnavailableError: when a process has ended, for want of memory perhaps.
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

    def _examine_apart(self, batch: Batch) -> Examined:
        process = self._idle.get()
        try:
            return process.examine(batch)
        finally:
            self._idle.put(process)


class _Process:
    def __init__(self, base_folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name in _ALLOWED_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.data.examiners", str(base_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def examine(self, batch: Batch) -> Examined:
        try:
            _write(self._input, msgspec.msgpack.encode(batch))
            return msgspec.msgpack.decode(_read(self._output), type=Examined)
        except (OSError, EOFError) as error:
            raise UnavailableError(
                "A process that read the file's rows has ended; try again. Operator: see the log, and whether "
                "the machine is short of memory."
            ) from error

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


def _serve(base_folder: Path) -> None:
    # What anything prints must not get among the answers.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    examiner = Examiner(base_folder)
    decoder = msgspec.msgpack.Decoder(Batch)
    with contextlib.suppress(EOFError, BrokenPipeError):
        # Ended by the parent's end of the pipe.
        while True:
            _write(output, msgspec.msgpack.encode(examiner.examine(decoder.decode(_read(sys.stdin.buffer)))))


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
