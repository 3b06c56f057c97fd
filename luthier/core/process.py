"""Tying one process's life to another's (Linux prctl(2), PR_SET_PDEATHSIG).

`python -m luthier.core.process PARENT_PID COMMAND…` does it for a process that has threads: between fork
and exec such a one may run no Python.
"""

import ctypes
import os
import signal
import sys

# What a training process says beside its events goes here in its run directory.
CHILD_LOG_NAME = "child.log"
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
# What Python and its libraries need to start as they did here; a secret of the service is none of it.
_BARE_VARIABLES = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"}
)
# Loaded at import: between fork and exec only async-signal-safe work is wise, and dlopen is not.
_libc = ctypes.CDLL(None, use_errno=True)


def bare_environment() -> dict[str, str]:
    """Return what a helper process may know of its surroundings: no secret of database, broker or storage."""
    return {name: value for name, value in os.environ.items() if name in _BARE_VARIABLES}


def tied_python(*arguments: str) -> list[str]:
    """Return the command that runs Python with arguments, and ends with the thread that starts it."""
    python = [sys.executable, "-P"]
    return [*python, "-m", "luthier.core.process", str(os.getpid()), *python, *arguments]


def die_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent ends. Call it in the child, after any setuid.

    Args:
        parent_pid: the parent's pid as the parent knew it, to catch a parent that is gone already.

    Raises:
        OSError: when the kernel refuses.
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
    """Tie this process to its parent, then become the command.

    Args:
        arguments: the parent's pid, then the program's path and its arguments.
    """
    die_with_parent(int(arguments[0]))
    os.execv(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
