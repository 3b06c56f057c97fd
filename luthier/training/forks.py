"""`python -P -m luthier.training --forks`: a process with its imports done, which forks one for each run.

So every run begins at once, in memory and a process group of its own, whatever came before it. Standard
input is a Unix socket: a message is a run directory and comes with the descriptor that its events go to.
Answers are lines: `started PID`, and when that process has ended `ended CODE`, as subprocess has exit codes.

Where there is an NVIDIA driver nothing is forked: imports may have called it, and a forked process can't. The
process itself does its first run there, and leaves.
"""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

from luthier.core.devices import NVIDIA_DRIVER
from luthier.core.process import die_with_parent
from luthier.training.signals import StopRequest

_MAX_PATH_BYTES = 4096

Run = Callable[[Path, int, StopRequest], bool]


def fork_runs(run: Run, stop: StopRequest) -> int:
    """Fork a process for each run that is asked for, one after another, until nobody will ask any more.

    Args:
        run: makes the run of a directory, its events written to a descriptor; tells whether it succeeded.
        stop: of this process, which has nothing to save.

    Returns:
        The exit code.
    """
    # A copy that neither a run nor what it starts takes for its standard input.
    with socket.socket(fileno=os.dup(0)) as requests:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        stop.leave_at_once = True
        while True:
            message, descriptors, _, _ = socket.recv_fds(requests, _MAX_PATH_BYTES, 1)
            if not message:
                return 0
            folder, (events,) = Path(os.fsdecode(message)), descriptors
            if NVIDIA_DRIVER.exists():
                stop.leave_at_once = False
                requests.sendall(f"started {os.getpid()}\n".encode())
                return int(not run(folder, events, stop))
            code = _fork(run, folder, events, requests)
            os.close(events)
            requests.sendall(f"ended {code}\n".encode())


def _fork(run: Run, folder: Path, events: int, requests: socket.socket) -> int:
    """Let a process of its own make a run; return its exit code when it has ended."""
    parent = os.getpid()
    pid = os.fork()
    if pid != 0:
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        os.setsid()
        die_with_parent(parent)
        stop = StopRequest().install()
        requests.sendall(f"started {os.getpid()}\n".encode())
        requests.close()
        code = int(not run(folder, events, stop))
    except Exception:  # noqa: BLE001 - nobody above is this process's
        traceback.print_exc()
    finally:
        # What lies above in the call stack is the parent's.
        os._exit(code)
