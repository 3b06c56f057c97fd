"""A file of a local folder being written piece by piece: whole and durable under its name, or not there.

Nothing here knows what the bytes are.
"""

import os
import secrets
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from luthier.storage.manifests import fsync_path


class LocalSink:
    """A file that exists under its path only after `close`. Its methods block.

    Args:
        path: where it will be; the folder is made when absent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # What a process that dies leaves behind is known by this end of its name, and deleted.
        self._unfinished = path.with_name(f"{path.name}#{secrets.randbits(63)}")
        self._file: BinaryIO | None = None
        # Who waits for a write in a thread may be cancelled, and abort while that write still goes on.
        self._lock = threading.Lock()
        self._is_aborted = False

    def write(self, chunk: bytes) -> None:
        """Append bytes.

        Raises:
            OSError: when the disk refuses them.
        """
        with self._lock:
            if not self._is_aborted:
                self._open().write(chunk)

    def close(self) -> None:
        """Make the file exist, durably: first its bytes, then its name.

        Raises:
            OSError: when the disk refuses.
        """
        with self._lock:
            if self._is_aborted:
                return
            file = self._open()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._unfinished.replace(self._path)
        fsync_path(self._path.parent)

    def abort(self) -> None:
        """Leave nothing behind, also of a file that was closed."""
        with self._lock:
            self._is_aborted = True
            if self._file is not None:
                # What a full disk did not take is not wanted.
                with suppress(OSError):
                    self._file.close()
            self._unfinished.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        """Return the open file; it is made when it is first needed."""
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._unfinished.open("xb")
        return self._file
