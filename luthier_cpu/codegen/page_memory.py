"""Memory in large pages, and giving memory back while its tensor stays."""

import ctypes
import itertools
import mmap
from collections.abc import Iterator, Sequence

import torch

# Linux, madvise(2): the range is zeros until it is written again.
_MADV_DONTNEED = 4
# The range should be in large pages, of 2 MiB on x86-64; a hint.
_MADV_HUGEPAGE = 14
_LARGE_PAGE = 1 << 21
# What a processor reads at a time.
LINE = 64


def take_large(num_bytes: int) -> torch.Tensor:
    """Return memory [num_bytes], uint8, in large pages where the system has them, at a multiple of 64 bytes.

    Weights that are read once a step from begin to end come faster from them: the processor looks ahead only
    within a page. What does not fill a large page is in small ones.
    """
    if num_bytes < _LARGE_PAGE:
        memory = torch.empty(num_bytes + LINE, dtype=torch.uint8)
        first = -memory.data_ptr() % LINE
        return memory[first : first + num_bytes]
    # Mapped alone: what goes back goes back to the system, and what only aligns is never touched.
    mapped = mmap.mmap(-1, num_bytes + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    first = -memory.data_ptr() % _LARGE_PAGE
    start, length = memory.data_ptr() + first, num_bytes // _LARGE_PAGE * _LARGE_PAGE
    # Refused where the system has no large pages: it works as well without.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return memory[first : first + num_bytes]


def discard(whole_LPX: torch.Tensor, pages: Sequence[int]) -> None:
    """Let the system have the memory of some pages; their numbers are lost.

    Args:
        whole_LPX: layers, pages, and any further sizes; contiguous.

    Raises:
        OSError: when the system refuses; what was asked for is not free then.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    page_bytes = whole_LPX[0, 0].nbytes
    for layer_PX in whole_LPX:
        for first, end in _runs(sorted(pages)):
            # The system's own pages that are wholly inside.
            start = layer_PX.data_ptr() + first * page_bytes
            aligned = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (layer_PX.data_ptr() + end * page_bytes - aligned) // mmap.PAGESIZE * mmap.PAGESIZE
            arguments = (ctypes.c_void_p(aligned), ctypes.c_size_t(length), _MADV_DONTNEED)
            if length > 0 and madvise(*arguments) != 0:
                raise OSError(ctypes.get_errno(), "memory of pages could not be given back")


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield beginning and end of each run of ascending numbers."""
    for _, run in itertools.groupby(enumerate(numbers), lambda item: item[1] - item[0]):
        (_, first), *others = run
        yield first, first + 1 + len(others)
