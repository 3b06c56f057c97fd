"""Telling the C library to keep freed memory: steps free and take the same sizes over and over.

By default glibc hands large blocks back to the kernel when they are freed, which clears every page anew
when the next step takes them: about a twentieth of a step's time on the machines measured.
"""

import ctypes
import sys
from typing import Any

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

# The largest block that glibc lets come from its heap; larger ones are mapped one by one.
_MAX_HEAP_BLOCK_BYTES = 32 * 1024**2


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next step.

    Returns:
        Whether the C library took the settings; others than glibc don't know them.
    """
    mallopt = _find("mallopt")
    if mallopt is None:
        return False
    settings = {
        _TRIM_THRESHOLD: 2**31 - 1,
        _TOP_PAD: 64 * 1024**2,
        _MMAP_THRESHOLD: _MAX_HEAP_BLOCK_BYTES,
    }
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def give_back_freed_memory() -> None:
    """Give the kernel what is free at the moment, so that what was needed once is not held for good."""
    malloc_trim = _find("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _find(name: str) -> Any:
    """Return a function of glibc; None where the C library is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
