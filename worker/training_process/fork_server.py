"""The fork server: a process with training's imports done that forks one for each run.

It holds no job and touches no device. It may be gone at any time: then a run starts a process of its own.
"""

import os
import select
import socket
import subprocess
import threading
from pathlib import Path
from typing import IO

from luthier.core.runtime import tied_python
from worker.training_process.child import child_environment

_MAX_ANSWER_BYTES = 100
# Another thread may have read what one waits for.
_LOOK_SECONDS = 0.1


class ForkedRun:
    """A run of the fork server, with the part of subprocess.Popen that a TrainingChild needs."""

    def __init__(
        self, fork_server: "subprocess.Popen[bytes]", answers: socket.socket, stdout: IO[bytes]
    ) -> None:
        self.stdout = stdout
        self._fork_server = fork_server
        self._answers = answers
        self._answered: dict[str, int] = {}
        self._is_over = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """The run's process and group; the fork server's until it has forked, and where it runs itself."""
        self._look()
        return self._answered.get("started", self._fork_server.pid)

    def wait(self) -> int:
        """Return the exit code of the run's process, or of the fork server where that ended first."""
        while not self._look():
            select.select([self._answers], [], [], _LOOK_SECONDS)
        self._answers.close()
        code = self._answered.get("ended")
        return self._fork_server.wait() if code is None else code

    def _look(self) -> bool:
        """Read the answers that have come, in any thread; return whether the run is over."""
        with self._lock:
            while not self._is_over:
                try:
                    answer = self._answers.recv(_MAX_ANSWER_BYTES, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    break
                except OSError:
                    answer = b""
                if answer:
                    word, _, number = answer.decode().partition(" ")
                    self._answered[word] = int(number)
                else:
                    self._is_over = True
            return self._is_over


class ForkServer:
    """At most one fork server of this worker process, which ends when it has waited for `idle_seconds`.

    Start and take it from the main thread alone: the kernel ties the server's life to the thread that
    made it, and its runs' lives to the server.
    """

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The fork server's process, None when there is none."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> None:
        """Let a process wait, unless one does already; returns at once, the imports take seconds."""
        if self.pid is not None:
            return
        self.stop()
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                tied_python("-m", "luthier.training", "--forks", str(self._idle_seconds)),
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # A run sets its own number of threads.
                env=child_environment(1),
                start_new_session=True,
            )

    def take(self, run_dir: Path) -> ForkedRun | None:
        """Have a run made; None when no fork server waits."""
        if self._process is None or self._requests is None:
            return None
        run = _ask(self._process, self._requests, run_dir)
        if run is None:
            self.stop()
        return run

    def stop(self) -> None:
        process, self._process = self._process, None
        requests, self._requests = self._requests, None
        if process is not None:
            process.kill()
            process.wait()
        if requests is not None:
            requests.close()


def _ask(process: "subprocess.Popen[bytes]", requests: socket.socket, run_dir: Path) -> ForkedRun | None:
    """Send a run directory with the descriptors for its events and its answers."""
    events, their_events = os.pipe()
    answers, their_answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    run = ForkedRun(process, answers, os.fdopen(events, "rb"))
    try:
        socket.send_fds(requests, [os.fsencode(run_dir)], [their_events, their_answers.fileno()])
    except OSError:
        run.stdout.close()
        answers.close()
        return None
    finally:
        os.close(their_events)
        their_answers.close()
    return run
