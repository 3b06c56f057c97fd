"""Counting plain rows in a process of its own: `python -m luthier.data.plain_rows`, started by `RowCounter`.

Reading JSON holds Python's lock, and who receives a file, hashes it and answers others needs the lock all the
while: for a large file it is worth a second process. That one knows nothing but blocks of lines; it has no
settings, no secrets and no network, and ends when its starter closes the pipe or dies.
"""

import mmap
import os
import struct
import subprocess
import sys
import threading
from collections import deque

from luthier.core.process import bare_environment
from luthier.data.plain_chat import count_plain_rows

# So many blocks may be on their way: the process has the next one there when it is done with one.
MAX_HELD_BLOCKS = 3
# Blocks are handed over in memory that both processes see; longer ones are counted where they are.
_SLOT_BYTES = 4 * 1024 * 1024
_SHARED_BYTES = MAX_HELD_BLOCKS * _SLOT_BYTES
# More than cores would only take turns: files beyond that have their rows counted where they are.
_FREE_PROCESSES = threading.BoundedSemaphore(os.cpu_count() or 1)
# Where a block lies in the shared memory, and its length; and the answer.
_QUESTION, _ANSWER = struct.Struct("<qq"), struct.Struct("<q")
# What stands for a block that is left to the check of single lines.
_NOT_PLAIN = -1
# The C library would give memory back after each block, and ask for the same anew (mallopt(3)).
_KEEPS_MEMORY = dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(32 * 1024 * 1024))


class _Counting:
    """The process that counts, and the memory it shares."""

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError("This system has no files that lie in memory alone.")
        descriptor = os.memfd_create("luthier-rows")
        try:
            os.truncate(descriptor, _SHARED_BYTES)
            self._shared = mmap.mmap(descriptor, _SHARED_BYTES)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                pass_fds=[descriptor],
                env=bare_environment() | _KEEPS_MEMORY,
                # A Ctrl-C is for the starter, which may finish what it received.
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
        assert self._process.stdin is not None and self._process.stdout is not None, "both are pipes"
        self._questions, self._answers = self._process.stdin, self._process.stdout
        # The end may come from another thread, while one waits for an answer.
        self._lock = threading.Lock()

    def ask(self, slot: int, block: bytes) -> None:
        """Have a block counted, in a slot whose last answer has been read."""
        start = slot * _SLOT_BYTES
        with self._lock:
            if self._shared.closed:
                raise BrokenPipeError("the process was ended")
            self._shared[start : start + len(block)] = block
            self._questions.write(_QUESTION.pack(start, len(block)))

    def answer(self) -> int | None:
        """Wait for the oldest answer that was not read."""
        with self._lock:
            answer = b"" if self._shared.closed else self._answers.read(_ANSWER.size)
        if len(answer) < _ANSWER.size:
            raise BrokenPipeError("the process has ended")
        num_rows: int = _ANSWER.unpack(answer)[0]
        return None if num_rows == _NOT_PLAIN else num_rows

    def end(self) -> None:
        """End the process, and let go of all that was shared with it."""
        self._process.kill()
        self._process.wait()
        # Who waited for an answer has got the end of the pipe by now.
        with self._lock:
            self._questions.close()
            self._answers.close()
            self._shared.close()


class RowCounter:
    """Count as `count_plain_rows` does, in another process, which the first block starts.

    Where there can be no such process, or it has died, the counting is done here. It is to be closed.
    """

    def __init__(self) -> None:
        self._counting: _Counting | None = None
        # Once it is over no block is given to the process any more.
        self._is_over = False
        # Closing may come from another thread than counting.
        self._lock = threading.Lock()
        # The blocks whose count was not asked for yet, and whether the process was given each.
        self._held: deque[tuple[bytes, bool]] = deque()
        self._num_given = 0

    @property
    def num_held(self) -> int:
        """How many blocks were put and not taken."""
        return len(self._held)

    def put(self, block: bytes) -> None:
        """Begin to count the rows of a block; of more than MAX_HELD_BLOCKS the last are counted by `take`.

        Args:
            block: whole lines, each with its line end.
        """
        has_slot = len(block) <= _SLOT_BYTES and len(self._held) < MAX_HELD_BLOCKS
        is_given = has_slot and self._give(block)
        self._held.append((block, is_given))

    def take(self) -> tuple[bytes, int | None]:
        """Wait for the block that was put first.

        Returns:
            The block, and how many rows it has; None when anything in it is not plain.
        """
        block, is_given = self._held.popleft()
        counting = self._counting
        if is_given and counting is not None:
            try:
                return block, counting.answer()
            except OSError:
                # It has died, or was ended: slower, and no less sure.
                self._is_over = True
        return block, count_plain_rows(block)

    def _give(self, block: bytes) -> bool:
        try:
            with self._lock:
                if self._is_over:
                    return False
                if self._counting is None:
                    self._counting = self._start()
                counting = self._counting
            counting.ask(self._num_given % MAX_HELD_BLOCKS, block)
        except OSError:
            self._is_over = True
            return False
        self._num_given += 1
        return True

    def _start(self) -> _Counting:
        if not _FREE_PROCESSES.acquire(blocking=False):
            raise OSError("All processes that may count are counting.")
        try:
            return _Counting()
        except OSError:
            _FREE_PROCESSES.release()
            raise

    def close(self) -> None:
        """End the process; what still is to be counted is counted here. Closing twice does no harm."""
        with self._lock:
            self._is_over = True
            counting, self._counting = self._counting, None
        if counting is not None:
            counting.end()
            _FREE_PROCESSES.release()


def _serve(descriptor: int) -> None:
    """Answer each question on stdin with the number of rows in that part of the shared memory."""
    shared = mmap.mmap(descriptor, _SHARED_BYTES, access=mmap.ACCESS_READ)
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(question := questions.read(_QUESTION.size)) == _QUESTION.size:
        start, num_bytes = _QUESTION.unpack(question)
        num_rows = count_plain_rows(shared[start : start + num_bytes])
        answers.write(_ANSWER.pack(_NOT_PLAIN if num_rows is None else num_rows))
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
