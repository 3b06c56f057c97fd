"""Memory for the next adapter beside a packed base, touched before it is wanted.

Memory that a process takes for the first time has to be found and cleared by the system, page by page. On a
virtual machine that takes longer than to lay an adapter out there.
"""

import threading

import torch

from luthier.modeling.kernels.page_memory import take_large

# What an adapter may leave unused of a spare memory that it takes, as a share.
_MOST_UNUSED = 0.05
# Less is found at once.
_LEAST_BYTES = 1 << 20


class SpareMemory:
    """One piece of memory on a CPU that nobody uses yet; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: torch.Tensor | None = None
        # What was taken last: adapters of one base are often alike.
        self.wanted_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that are spare now."""
        spare = self._spare
        return 0 if spare is None else len(spare)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return memory [num_bytes], uint8, in large pages: the spare one if it is about as large."""
        with self._lock:
            self.wanted_bytes = num_bytes
            spare = self._spare
            if spare is not None and num_bytes <= len(spare) <= num_bytes * (1 + _MOST_UNUSED):
                self._spare = None
                return spare[:num_bytes]
        return take_large(num_bytes)

    def prepare(self) -> None:
        """Have memory of the size that was taken last. Takes as long as the system does to find it."""
        num_bytes = self.wanted_bytes
        if num_bytes < _LEAST_BYTES or num_bytes == self.num_bytes:
            return
        self.drop()
        memory = take_large(num_bytes)
        memory.zero_()
        with self._lock:
            self._spare = memory

    def drop(self) -> None:
        """Give it back."""
        with self._lock:
            self._spare = None
