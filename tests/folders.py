"""Where tests keep their files."""

import os
import tempfile

_MEMORY = "/dev/shm"
_MIN_FREE_BYTES = 4 << 30


def _temporary_folder() -> str:
    try:
        found = os.statvfs(_MEMORY)
    except OSError:
        return "/tmp"
    is_large = found.f_bavail * found.f_frsize >= _MIN_FREE_BYTES
    is_usable = os.access(_MEMORY, os.W_OK | os.X_OK) and not found.f_flag & os.ST_NOEXEC
    return _MEMORY if is_large and is_usable else "/tmp"


# In memory where it has room: there fsync, which no test needs, takes microseconds instead of milliseconds.
# Its path is short, since a socket's has few bytes, and each user may enter it.
TEMPORARY_FOLDER = _temporary_folder()


def use_temporary_folder() -> None:
    """Let pytest, this process and what it starts keep temporary files there."""
    os.environ["TMPDIR"] = TEMPORARY_FOLDER
    tempfile.tempdir = None
