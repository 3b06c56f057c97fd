"""`python -P -m luthier.training --forks IDLE_SECONDS`: imports done, forks a process for each run.

So every run begins at once, in memory and a process group of its own, whatever came before it. Standard input
is a Unix socket of packets. A request is a run directory, and comes with two descriptors: where the run's
events go, and a socket for the state of its process: `started PID`, and in the end `ended CODE`, as
subprocess has exit codes. Until the next request the ended process is not reaped, so its id is not reused.

Where there is an NVIDIA driver nothing is forked: imports may have called it, and a forked process can't. The
process itself does its first run there, and leaves.
"""

import contextlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from luthier.core.devices import NVIDIA_DRIVER
from luthier.core.runtime import CHILD_LOG_NAME, die_with_parent
from luthier.training.process_io import StopRequest

_MAX_PATH_BYTES = 4096

Run = Callable[[Path, int, StopRequest], bool]


def fork_runs(run: Run, stop: StopRequest, idle_seconds: float) -> int:
    """Fork a process for each run that is asked for, one after another, until the socket is closed or idle.

    Args:
        run: makes the run of a directory, its events written to a descriptor; returns whether it succeeded.
        stop: of this process. It leaves at once while it waits; in a run TERM is the run's.
    """
    ended: int | None = None
    # A copy that neither a run nor what it starts takes for its standard input.
    with socket.socket(fileno=os.dup(0)) as requests:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        requests.settimeout(idle_seconds)
        while True:
            # First this: a TERM before it is seen in what follows, one after it ends the process.
            stop.leave_at_once = True
            if stop.is_set:
                return 0
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    requests, _MAX_PATH_BYTES, 2, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                return 0
            stop.leave_at_once = False
            if ended is not None:
                os.waitpid(ended, 0)
            if not message or stop.is_set:
                return 0
            folder, (events, status) = Path(os.fsdecode(message)), descriptors
            with socket.socket(fileno=status) as answers:
                if NVIDIA_DRIVER.exists():
                    answers.send(f"started {os.getpid()}".encode())
                    return _run(run, folder, events, stop)
                ended, code = _fork(run, folder, events, answers, requests, stop)
                os.close(events)
                answers.send(f"ended {code}".encode())


def _fork(
    run: Run, folder: Path, events: int, answers: socket.socket, requests: socket.socket, stop: StopRequest
) -> tuple[int, int]:
    """Let a process of its own make a run; return its id, not reaped yet, and its exit code."""
    parent = os.getpid()
    # Neither process may miss a TERM while it has not yet said what that means.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid == 0:
        _become(run, folder, events, answers, requests, parent)

    def pass_on(*_: object) -> None:
        stop.is_set = True
        os.kill(pid, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if stop.is_set:
        # It came before anybody could pass it on.
        pass_on()
    ending = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    signal.signal(signal.SIGTERM, before)
    with contextlib.suppress(ProcessLookupError):
        # What the run has left behind of its group.
        os.killpg(pid, signal.SIGKILL)
    assert ending is not None, "without WNOHANG it waits"
    has_exited = ending.si_code == os.CLD_EXITED
    return pid, ending.si_status if has_exited else -ending.si_status


def _become(
    run: Run, folder: Path, events: int, answers: socket.socket, requests: socket.socket, parent: int
) -> None:
    """Make the run in this process, which was just forked, and end it."""
    code = 1
    try:
        os.setsid()
        die_with_parent(parent)
        stop = StopRequest().install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        requests.close()
        answers.send(f"started {os.getpid()}".encode())
        answers.close()
        code = _run(run, folder, events, stop)
    except Exception:  # noqa: BLE001 - the frames above are the parent's
        traceback.print_exc()
    finally:
        # The frames above in the call stack are the parent's.
        os._exit(code)


def _run(run: Run, folder: Path, events: int, stop: StopRequest) -> int:
    """Make a run, with standard output and error in its log; return the exit code."""
    sys.stderr.flush()
    log = os.open(folder / CHILD_LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return int(not run(folder, events, stop))
