"""A file in memory, where it is hashed in one piece and read from at the same time. Never torch."""

import contextlib
import mmap
from pathlib import Path

from luthier.core.errors import ArtifactCorruptError

# Linux, madvise(2), since 5.14.
_MADV_POPULATE_READ = 22


def map_file(path: Path) -> memoryview:
    """Map a file into memory, all of it at once: page by page it would take several times as long.

    Args:
        path: the file; who changes it meanwhile changes what is seen.

    Returns:
        Its bytes.

    Raises:
        ArtifactCorruptError: when it is empty or can't be read.
    """
    try:
        with path.open("rb") as stream:
            # What is written there would be this process's own; nothing is.
            writable = mmap.PROT_READ | mmap.PROT_WRITE
            mapped = mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=writable)
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError("The artifact's weights can't be read.") from error
    # An older system comes page by page.
    with contextlib.suppress(OSError):
        mapped.madvise(_MADV_POPULATE_READ)
    return memoryview(mapped)
