"""Telling the C library to keep freed memory: steps free and take the same sizes over and over.

By default glibc hands large blocks back to the kernel when they are freed, which clears every page anew
when the next step takes them: about a twentieth of a step's time on the machines measured.
"""

import ctypes
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

# The largest block that glibc lets come from its heap; larger ones are mapped one by one.
_MAX_HEAP_BLOCK_BYTES = 32 * 1024**2


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next step.

    Returns:
        Whether the C library took the settings; others than glibc don't know them.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {
        _TRIM_THRESHOLD: 2**31 - 1,
        _TOP_PAD: 64 * 1024**2,
        _MMAP_THRESHOLD: _MAX_HEAP_BLOCK_BYTES,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())
