"""A file of a local folder being written piece by piece: whole and durable under its name, or not there.

Large files go past the page cache (open(2), O_DIRECT): filling the cache costs the processor several times
what the copy to the disk does, and at the end the whole file would have to be waited for at once. Nothing
here knows what the bytes are.
"""

import errno
import fcntl
import mmap
import os
import secrets
import threading
from pathlib import Path

from luthier.storage.manifests import fsync_path

_BUFFER_BYTES = 4 * 1024 * 1024
# Absent where the system has no such thing; then all writes go through the page cache.
_DIRECT = getattr(os, "O_DIRECT", 0)


class LocalSink:
    """A file that exists under its path only after `close`. Its methods block.

    Args:
        path: where it will be; the folder is made when absent.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # What a process that dies leaves behind is known by this end of its name, and deleted.
        self._unfinished = path.with_name(f"{path.name}#{secrets.randbits(63)}")
        self._descriptor: int | None = None
        # Memory of its own pages: direct writes ask for such addresses and lengths.
        self._buffer = mmap.mmap(-1, _BUFFER_BYTES)
        self._num_waiting = 0
        # Who waits for a write in a thread may be cancelled, and abort while that write still goes on.
        self._lock = threading.Lock()
        self._is_aborted = False

    def write(self, chunk: bytes) -> None:
        """Append bytes.

        Args:
            chunk: any number of bytes.

        Raises:
            OSError: when the disk refuses them.
        """
        with self._lock:
            rest = memoryview(chunk)
            while rest and not self._is_aborted:
                num_bytes = min(len(rest), _BUFFER_BYTES - self._num_waiting)
                self._buffer[self._num_waiting : self._num_waiting + num_bytes] = rest[:num_bytes]
                self._num_waiting += num_bytes
                rest = rest[num_bytes:]
                if self._num_waiting == _BUFFER_BYTES:
                    self._write_out()

    def close(self) -> None:
        """Make the file exist, durably: first its bytes, then its name.

        Raises:
            OSError: when the disk refuses.
        """
        with self._lock:
            if self._is_aborted:
                return
            descriptor = self._open()
            # The end is no whole number of pages.
            _leave_direct(descriptor)
            self._write_out()
            os.fsync(descriptor)
            self._close()
            self._unfinished.replace(self._path)
        fsync_path(self._path.parent)

    def abort(self) -> None:
        """Leave nothing behind, also of a file that was closed."""
        with self._lock:
            self._is_aborted = True
            self._close()
            self._unfinished.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)

    def _open(self) -> int:
        """Return the file's descriptor; it is made when it is first needed."""
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            try:
                self._descriptor = os.open(self._unfinished, flags | _DIRECT, 0o666)
            except OSError as error:
                # A file system that has no direct writes; some have made the file all the same.
                if error.errno != errno.EINVAL:
                    raise
                self._unfinished.unlink(missing_ok=True)
                self._descriptor = os.open(self._unfinished, flags, 0o666)
        return self._descriptor

    def _write_out(self) -> None:
        descriptor = self._open()
        with memoryview(self._buffer) as waiting:
            num_written = 0
            while num_written < self._num_waiting:
                try:
                    num_written += os.write(descriptor, waiting[num_written : self._num_waiting])
                except OSError as error:
                    if error.errno != errno.EINVAL or not _leave_direct(descriptor):
                        raise
        self._num_waiting = 0

    def _close(self) -> None:
        # At once, and not when the collector comes by.
        self._buffer.close()
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _leave_direct(descriptor: int) -> bool:
    """Let a file's next writes go through the page cache; False when they do already."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & _DIRECT:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
    return True
