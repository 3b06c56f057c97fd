"""Memory for the next adapter beside a packed base, touched before it is wanted.

Memory that a process takes for the first time has to be found and cleared by the system, page by page. On a
virtual machine that takes longer than to lay an adapter out there.
"""

import ctypes
import threading
import time

import torch

from luthier.modeling.kernels.page_memory import take_large

# What an adapter may leave unused of a spare piece that it takes, as a share.
_MOST_UNUSED = 0.05
# Less is found at once, and lies in small pages.
_LEAST_BYTES = 1 << 21
# Pieces for adapters that come one right after the other, unless they are large.
_MOST_PIECES, _MOST_BYTES = 4, 1 << 26
# So much is touched at a time, and so long others have the processor then: a tenth of a thread's time or so.
_STRIDE_BYTES, _REST_SECONDS = 1 << 21, 0.02


class SpareMemory:
    """Pieces of memory on a CPU that nobody uses yet, all of one size; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[torch.Tensor] = []
        self._num_pending = self._num_drops = 0
        # What was taken last: adapters of one base are often alike.
        self.wanted_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are spare now, or about to be."""
        with self._lock:
            return sum(map(len, self._pieces)) + self._num_pending

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return memory [num_bytes], uint8, in large pages: a spare piece if they are about as large."""
        with self._lock:
            self.wanted_bytes = num_bytes
            if self._pieces and num_bytes <= len(self._pieces[-1]) <= num_bytes * (1 + _MOST_UNUSED):
                return self._pieces.pop()[:num_bytes]
        return take_large(num_bytes)

    @property
    def is_missing(self) -> bool:
        """Whether one more piece of the size that was taken last is to be prepared."""
        with self._lock:
            return self._is_missing()

    def _is_missing(self) -> bool:
        num_bytes = self.wanted_bytes
        num_ready = sum(len(piece) == num_bytes for piece in self._pieces)
        return num_bytes >= _LEAST_BYTES and num_ready < min(_MOST_PIECES, _MOST_BYTES // num_bytes)

    def prepare(self) -> bool:
        """Have one more piece of the size that was taken last, unless there are enough.

        It takes its time, and gives the processor to others meanwhile.

        Returns:
            Whether there is one more now.

        Raises:
            OSError: when the system has no memory.
        """
        with self._lock:
            num_bytes, num_drops = self.wanted_bytes, self._num_drops
            if self._pieces and len(self._pieces[0]) != num_bytes:
                self._pieces.clear()
            if not self._is_missing():
                return False
            self._num_pending = num_bytes
        try:
            memory = take_large(num_bytes)
            # Not by an operator of torch, which would make a team of threads of its own for this one.
            for start in range(0, num_bytes, _STRIDE_BYTES):
                ctypes.memset(memory.data_ptr() + start, 0, min(_STRIDE_BYTES, num_bytes - start))
                time.sleep(_REST_SECONDS)
                if self._num_drops != num_drops:
                    return False
        finally:
            self._num_pending = 0
        with self._lock:
            is_wanted = (num_bytes, num_drops) == (self.wanted_bytes, self._num_drops)
            if is_wanted:
                self._pieces.append(memory)
        return is_wanted

    def drop(self) -> None:
        """Give them back, and what is being prepared."""
        with self._lock:
            self._num_drops += 1
            self._pieces.clear()
