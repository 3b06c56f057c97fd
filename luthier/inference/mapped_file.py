"""A file in memory, where it is hashed and read from at the same time. Never torch."""

import ctypes
import errno
import mmap
from pathlib import Path

import numpy as np

from luthier.core.errors import ArtifactCorruptError

# Linux, madvise(2), since 5.14; before it is EINVAL.
_MADV_POPULATE_READ = 22


def map_file(path: Path) -> memoryview:
    """Map a file into memory, all of it at once: page by page it would take several times as long.

    Other threads run meanwhile. What can't be read is found here (but for older systems), where whoever reads
    later would be ended by the system.

    Args:
        path: the file; who changes it meanwhile changes what is seen.

    Returns:
        Its bytes, which nobody may write.

    Raises:
        ArtifactCorruptError: when it is empty or can't be read.
    """
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        content = memoryview(mapped)
        # Not mmap's own method, which keeps the interpreter's lock.
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        place, length = ctypes.c_void_p(address_of(content)), ctypes.c_size_t(len(content))
        if madvise(place, length, _MADV_POPULATE_READ) != 0 and ctypes.get_errno() != errno.EINVAL:
            raise OSError(ctypes.get_errno(), "the file can't be read to its end")
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError(f"The artifact's {path.name} can't be read.") from error
    return content


def address_of(content: memoryview) -> int:
    """Return where bytes lie in memory."""
    return int(np.frombuffer(content, dtype=np.uint8).ctypes.data)
