"""A warm spare: a training process that has done its imports and waits for a run directory on stdin.

It holds no job and touches no device. It may be gone at any time: then a run starts a process of its own.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path

from worker.child import child_environment


class WarmSpare:
    """At most one waiting process of this worker process.

    Start and take it from the main thread alone: the kernel ties the waiting process's life to the thread
    that made it.

    Args:
        idle_seconds: how long it may wait before its memory is given back.
    """

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._num_threads = 0
        self._timer: threading.Timer | None = None

    def start(self, num_threads: int) -> None:
        """Let a process wait, unless one does already; returns at once, the imports take seconds.

        Args:
            num_threads: CPU threads that its run may use.
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
            command = [sys.executable, "-P", "-m", "luthier.training", "--warm"]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "luthier.core.process", str(os.getpid()), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=child_environment(num_threads),
                start_new_session=True,
            )
            self._num_threads = num_threads
            self._wait_on()

    def take(self, run_dir: Path, num_threads: int) -> "subprocess.Popen[bytes] | None":
        """Send the waiting process to work.

        Args:
            run_dir: the run directory, complete.
            num_threads: CPU threads it may use.

        Returns:
            The process, which is no spare any more; None when none waits that could do it.
        """
        with self._lock:
            process, self._process = self._process, None
            self._stop_timer()
        if process is None:
            return None
        if self._num_threads == num_threads and _send(process, run_dir):
            return process
        _kill(process)
        return None

    def stop(self) -> None:
        """End the waiting process, if there is one."""
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
        if process is not None:
            _kill(process)


def _send(process: "subprocess.Popen[bytes]", run_dir: Path) -> bool:
    assert process.stdin is not None
    try:
        process.stdin.write(f"{run_dir}\n".encode())
        # The end of its input: it leaves after this run.
        process.stdin.close()
    except BrokenPipeError:
        return False
    return process.poll() is None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            stream.close()
