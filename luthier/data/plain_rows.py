"""Counting plain rows in a process of its own: `python -m luthier.data.plain_rows`, started by `RowCounter`.

Reading JSON holds Python's lock, and who receives a file, hashes it and answers others needs the lock all the
while: for a large file it is worth a second process. That one knows nothing but blocks of lines; it has no
settings, no secrets and no network, and ends when its starter closes the pipe or dies.
"""

import mmap
import os
import subprocess
import sys
import tempfile
import threading

from luthier.data.plain_chat import count_plain_rows

# Lines are handed over in memory that both processes see; longer blocks are counted where they are.
_SHARED_BYTES = 4 * 1024 * 1024
_NUMBER_BYTES = 8
# What stands for a block that is left to the check of single lines.
_NOT_PLAIN = -1
# What Python needs to start as it was started here; all else stays here.
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class RowCounter:
    """Count as `count_plain_rows` does, in another process, which is started by the first count.

    Where there can be no such process, or it has died, the counting is done here. It is to be closed.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._shared: mmap.mmap | None = None
        self._is_over = False
        self._lock = threading.Lock()

    def count(self, block: bytes) -> int | None:
        """Count the rows of a block of whole lines.

        Args:
            block: whole lines, each with its line end.

        Returns:
            How many; None when the block has anything in it that is not plain.
        """
        if len(block) <= _SHARED_BYTES and not self._is_over:
            try:
                return self._ask(block)
            except OSError:
                # No process to be had, or none any more: slower, and no less sure.
                self._is_over = True
        return count_plain_rows(block)

    def _ask(self, block: bytes) -> int | None:
        process, shared = self._start()
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        shared[: len(block)] = block
        process.stdin.write(_to_bytes(len(block)))
        answer = process.stdout.read(_NUMBER_BYTES)
        if len(answer) < _NUMBER_BYTES:
            raise BrokenPipeError("the process has ended")
        num_rows = int.from_bytes(answer, "little", signed=True)
        return None if num_rows == _NOT_PLAIN else num_rows

    def _start(self) -> tuple[subprocess.Popen[bytes], mmap.mmap]:
        with self._lock:
            if self._is_over:
                raise BrokenPipeError("the counter is closed")
            if self._process is None or self._shared is None:
                with tempfile.TemporaryFile(prefix="luthier-rows-") as file:
                    file.truncate(_SHARED_BYTES)
                    self._shared = mmap.mmap(file.fileno(), _SHARED_BYTES)
                    self._process = subprocess.Popen(
                        [sys.executable, "-m", __name__, str(file.fileno())],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        bufsize=0,
                        pass_fds=[file.fileno()],
                        env={name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ},
                        # A Ctrl-C is for the starter, which may finish what it received.
                        start_new_session=True,
                    )
            return self._process, self._shared

    def close(self) -> None:
        """End the process; a count that still goes on is finished here."""
        with self._lock:
            self._is_over = True
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            # Its pipes stay to who still reads from them.
            process.wait()


def _to_bytes(number: int) -> bytes:
    return number.to_bytes(_NUMBER_BYTES, "little", signed=True)


def _serve(descriptor: int) -> None:
    """Answer each length on stdin with the number of rows in so many bytes of the shared memory."""
    shared = mmap.mmap(descriptor, _SHARED_BYTES, access=mmap.ACCESS_READ)
    asked, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(length := asked.read(_NUMBER_BYTES)) == _NUMBER_BYTES:
        num_rows = count_plain_rows(shared[: int.from_bytes(length, "little", signed=True)])
        answers.write(_to_bytes(_NOT_PLAIN if num_rows is None else num_rows))
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
