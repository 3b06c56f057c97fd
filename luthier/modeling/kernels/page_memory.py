"""Memory asked for in large pages and in time, and given back while the tensor that it lies in stays."""

import contextlib
import ctypes
import mmap
import os
import queue
import threading
from collections.abc import Sequence

import torch

# Linux, madvise(2): the range is zeros until it is written again.
_MADV_DONTNEED = 4
# The range is to lie in large pages, of 2 MiB on x86-64; a wish.
_MADV_HUGEPAGE = 14
_LARGE_PAGE = 1 << 21
# What a processor reads at a time.
_LINE = 64
# The largest piece that is kept ready, in bytes; and the priority of a thread that nobody waits for.
_MOST_AHEAD = 1 << 28
_NICEST = 19


def take_large(num_bytes: int) -> torch.Tensor:
    """Return memory [num_bytes], uint8, in large pages where the system has them, at a multiple of 64 bytes.

    Weights that are read once a step from begin to end come faster from them: the processor looks ahead only
    within a page. What does not fill a large page lies in small ones.
    """
    if num_bytes < _LARGE_PAGE:
        memory = torch.empty(num_bytes + _LINE, dtype=torch.uint8)
        first = -memory.data_ptr() % _LINE
        return memory[first : first + num_bytes]
    # Mapped alone: what goes back goes back to the system, and what only aligns is never touched.
    mapped = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    first = -memory.data_ptr() % _LARGE_PAGE
    start, length = memory.data_ptr() + first, num_bytes // _LARGE_PAGE * _LARGE_PAGE
    # Refused where the system has no large pages: it works as well without.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return memory[first : first + num_bytes]


class RoomAhead:
    """Keeps one piece of memory ready, of the size that was taken last.

    The system finds and clears new memory when it is first touched, which of a large piece takes longer than
    filling it; a virtual machine may even have to ask for it. So the next one is touched while nobody waits.
    """

    def __init__(self) -> None:
        self._ready: torch.Tensor | None = None
        self._wanted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return memory as `take_large` does, and let the next piece of this size be made ready."""
        with self._lock:
            ready, self._ready = self._ready, None
            if num_bytes <= _MOST_AHEAD:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="room-ahead", daemon=True)
                    self._thread.start()
                self._wanted.put(num_bytes)
        return ready if ready is not None and len(ready) == num_bytes else take_large(num_bytes)

    def _run(self) -> None:
        # Others, who answer somebody, go before it. Not every system lets a thread step back.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
        while True:
            room = take_large(self._wanted.get())
            room[:: mmap.PAGESIZE] = 0
            with self._lock:
                self._ready = room
            # A name that outlived this turn would keep it.
            del room


def discard(whole_LPX: torch.Tensor, pages: Sequence[int]) -> None:
    """Let the system have the memory of some pages; their numbers are lost. On a GPU nothing happens.

    Args:
        whole_LPX: layers, pages, and any further sizes; contiguous.
        pages: numbers along P.

    Raises:
        OSError: when the system refuses; what was asked for is not free then.
    """
    if whole_LPX.device.type != "cpu" or not whole_LPX.is_contiguous():
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    page_bytes = whole_LPX[0, 0].nbytes
    for layer_PX in whole_LPX:
        for first, end in _runs(sorted(pages)):
            # What of the system's own pages lies wholly inside.
            start = layer_PX.data_ptr() + first * page_bytes
            aligned = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (layer_PX.data_ptr() + end * page_bytes - aligned) // mmap.PAGESIZE * mmap.PAGESIZE
            arguments = (ctypes.c_void_p(aligned), ctypes.c_size_t(length), _MADV_DONTNEED)
            if length > 0 and madvise(*arguments) != 0:
                raise OSError(ctypes.get_errno(), "memory of pages could not be given back")


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return beginning and end of each run of ascending numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
