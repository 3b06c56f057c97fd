"""Processes of a measurement: they speak JSON lines, stand still while another side runs, and die with us."""

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.core.runtime import die_with_parent

# Compiling a peer's model takes minutes; hours mean that something hangs.
MAX_SECONDS = 1800.0
_STOP_SECONDS = 10.0


class SideFailedError(Exception):
    """A process of ours or of a peer does not run here; the message holds its last words, in one line."""


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A process in a session of its own, with all that it starts.

    Spawn from the main thread only: the kernel's death signal follows the thread that spawned (prctl(2)).

    Args:
        command: program and arguments.
        environment: all of its environment.
        log: where what it says goes.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        parent = os.getpid()

        def settle() -> None:
            die_with_parent(parent)
            # Where memory runs short, a process of ours is killed, and no other (proc(5)).
            Path("/proc/self/oom_score_adj").write_text("1000")

        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=settle,  # noqa: PLW1509 - one thread, see above
            )

    @property
    def pid(self) -> int:
        """The process, which leads its group."""
        return self._process.pid

    def ask(self, order: Mapping[str, Any], *, timeout_seconds: float = MAX_SECONDS) -> dict[str, Any]:
        """Send one line and return the line that answers it.

        Args:
            order: anything that JSON can hold.
            timeout_seconds: how long the answer may take.

        Returns:
            The answer.

        Raises:
            SideFailedError: when it ends, hangs, or answers with a fault.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise SideFailedError(self._last_words()) from error
        return self.receive(timeout_seconds=timeout_seconds)

    def receive(self, *, timeout_seconds: float = MAX_SECONDS) -> dict[str, Any]:
        """Return the next line that it says.

        Args:
            timeout_seconds: how long it may take.

        Returns:
            What the line holds.

        Raises:
            SideFailedError: when it ends, hangs, or reports a fault.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_seconds)
        if not ready:
            raise SideFailedError(f"it said nothing for {timeout_seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise SideFailedError(self._last_words())
        reported: dict[str, Any] = json.loads(line)
        if "fault" in reported:
            raise SideFailedError(str(reported["fault"])[:300])
        return reported

    def check(self) -> None:
        """Make sure that it runs.

        Raises:
            SideFailedError: when it has ended.
        """
        if self._process.poll() is not None:
            raise SideFailedError(self._last_words())

    def pause(self) -> None:
        """Let it and all that it started stand still."""
        os.killpg(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it continue."""
        os.killpg(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it and all that it started."""
        for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, None)):
            try:
                os.killpg(self.pid, signal.SIGCONT)
                os.killpg(self.pid, number)
                self._process.wait(seconds)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()

    def status_bytes(self, field: str) -> int:
        """Return one line of its /proc/PID/status (proc(5)) in bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise SideFailedError(f"/proc/{self.pid}/status has no {field}")

    def _last_words(self) -> str:
        deadline = time.monotonic() + 2
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._process.poll() == -signal.SIGKILL:
            return "it was killed, most likely for want of memory"
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        # A library's traceback is reported by the line that names its error, not by what is printed after it.
        named = [line for line in lines if line.split(":", 1)[0].endswith(("Error", "Exception"))]
        words = (named or lines or ["it said nothing"])[-1][:300]
        return f"exit code {self._process.poll()}: {words}"
