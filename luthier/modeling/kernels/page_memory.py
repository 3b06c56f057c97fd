"""Giving the memory of pages back to the system while the tensor that they lie in stays."""

import ctypes
import mmap
from collections.abc import Sequence

import torch

# Linux, madvise(2): the range is zeros until it is written again.
_MADV_DONTNEED = 4


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
