"""A spare: a process that has done the imports of training and forks one for each run (training/forks.py).

It holds no job and touches no device. It may be gone at any time: then a run starts a process of its own.
"""

import os
import select
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from worker.child import child_environment

_MAX_ANSWER_BYTES = 4096
# Another thread may have read what one waits for.
_LOOK_SECONDS = 0.1


class SpareRun:
    """A run that a spare was asked for: of subprocess.Popen what a TrainingChild needs.

    Args:
        process: the spare.
        answers: what it says of the run.
        stdout: the run's events.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", answers: socket.socket, stdout: IO[bytes]) -> None:
        self.stdout = stdout
        self._spare = process
        self._answers = answers
        self._text = ""
        self._is_over = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """The run's process and group; the spare's until it has forked, and where it runs itself."""
        pid = self._told("started")
        return self._spare.pid if pid is None else pid

    def wait(self) -> int:
        """Return the exit code of the run's process, or of the spare where that ended first."""
        while (code := self._told("ended")) is None and not self._is_over:
            select.select([self._answers], [], [], _LOOK_SECONDS)
        return self._spare.wait() if code is None else code

    def _told(self, what: str) -> int | None:
        """Return the number that came with a word, None if it has not come yet; any thread may ask."""
        with self._lock:
            self._read()
            for line in self._text.split("\n")[:-1]:
                word, _, number = line.partition(" ")
                if word == what:
                    return int(number)
        return None

    def _read(self) -> None:
        try:
            answer = b"" if self._is_over else self._answers.recv(_MAX_ANSWER_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            answer = b""
        self._is_over = not answer
        self._text += answer.decode()


class WarmSpare:
    """At most one spare of this worker process.

    Start and take it from the main thread alone: the kernel ties the spare's life to the thread that made it,
    and its runs' lives to the spare.

    Args:
        idle_seconds: how long it may wait before its memory is given back.
    """

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._num_threads = 0
        self._timer: threading.Timer | None = None

    def start(self, num_threads: int) -> None:
        """Let a process wait, unless one does already; returns at once, the imports take seconds.

        Args:
            num_threads: CPU threads that its runs may use.
        """
        with self._lock:
            if (
                self._process is not None
                and self._process.poll() is None
                and self._num_threads == num_threads
            ):
                self._wait_on()
                return
            self._end()
            self._requests, theirs = socket.socketpair()
            command = [sys.executable, "-P", "-m", "luthier.training", "--forks"]
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "luthier.core.process", str(os.getpid()), *command],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    env=child_environment(num_threads),
                    start_new_session=True,
                )
            self._num_threads = num_threads
            self._wait_on()

    def take(self, run_dir: Path, num_threads: int) -> SpareRun | None:
        """Have a run made; the spare waits on when that has ended.

        Args:
            run_dir: the run directory, complete.
            num_threads: CPU threads it may use.

        Returns:
            The run; None when no spare waits that could do it.
        """
        with self._lock:
            self._stop_timer()
            process, requests = self._process, self._requests
            if process is None or requests is None:
                return None
            if self._num_threads == num_threads and process.poll() is None:
                run = _ask(process, requests, run_dir)
                if run is not None:
                    return run
            self._end()
            return None

    def stop(self) -> None:
        """End the spare, if there is one."""
        with self._lock:
            self._end()

    def _wait_on(self) -> None:
        self._stop_timer()
        self._timer = threading.Timer(self._idle_seconds, self.stop)
        self._timer.daemon = True
        self._timer.start()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._stop_timer()
        process, self._process = self._process, None
        requests, self._requests = self._requests, None
        if process is not None:
            process.kill()
            process.wait()
        if requests is not None:
            requests.close()


def _ask(process: "subprocess.Popen[bytes]", requests: socket.socket, run_dir: Path) -> SpareRun | None:
    """Send a run directory with the descriptor for its events."""
    ours, theirs = os.pipe()
    try:
        socket.send_fds(requests, [os.fsencode(run_dir)], [theirs])
    except OSError:
        os.close(ours)
        return None
    finally:
        os.close(theirs)
    return SpareRun(process, requests, os.fdopen(ours, "rb"))
