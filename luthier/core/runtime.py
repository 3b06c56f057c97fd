"""The running process: garbage collection, the C allocator, and a process's tie to its parent.

`python -m luthier.core.runtime PARENT_PID COMMAND…` ties a command to its parent and then becomes it (Linux
prctl(2), PR_SET_PDEATHSIG): a process that has threads may run no Python between fork and exec.
"""

import ctypes
import gc
import os
import signal
import sys
from typing import Any


def freeze_garbage() -> None:
    """Exclude all current objects from garbage collection.

    Each full collection traverses the hundred thousand objects of the modules with the GIL held, which stalls
    every stream. Cycles that exist now are never freed: call it after the imports, before any work.
    """
    gc.collect()
    gc.freeze()


# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3

# The largest block that glibc lets come from its heap; larger ones are mapped one by one.
_MAX_HEAP_BLOCK_BYTES = 32 * 1024**2


def keep_freed_memory() -> bool:
    """Keep freed memory in this process for the next step; return False where the C library is not glibc.

    By default glibc returns large freed blocks to the kernel, which clears every page again when the next
    step takes them: about a twentieth of a step's time on the machines measured.
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
    malloc_trim = _find("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _find(name: str) -> Any:
    """Return a function of glibc; None where the C library is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


# Output of a training process beside its events, in its run directory.
CHILD_LOG_NAME = "child.log"
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
# What Python and its libraries need to start as they did here; a secret of the service is none of it.
BARE_VARIABLES = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"}
)
# Loaded at import: between fork and exec only async-signal-safe work is wise, and dlopen is not.
_libc = ctypes.CDLL(None, use_errno=True)


def bare_environment() -> dict[str, str]:
    """Return the environment of a helper process: no secret of database, broker or storage."""
    return {name: value for name, value in os.environ.items() if name in BARE_VARIABLES}


def tied_python(*arguments: str) -> list[str]:
    """Return the command that runs Python with arguments, and ends with the thread that starts it."""
    python = [sys.executable, "-P"]
    return [*python, "-m", "luthier.core.runtime", str(os.getpid()), *python, *arguments]


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent ends. Call it in the child, after any setuid.

    `parent_pid` is compared, to catch a parent that has already ended.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal_number)


def hide_memory() -> None:
    """Hide our memory and environment from other processes of this user (prctl(2), PR_SET_DUMPABLE).

    A program that this process starts is readable again.
    """
    if _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")


def main(arguments: list[str]) -> None:
    """Tie this process to the parent of that pid, then become the command: a path and its arguments."""
    die_with_parent(int(arguments[0]))
    os.execv(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
