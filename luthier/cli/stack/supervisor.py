"""A supervisor of processes: start, wait until ready, restart with backoff, stop in order within a limit.

One thread, no callbacks: signals only wake the loop.
"""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from luthier.cli.stack.home import StackError
from luthier.cli.stack.processes import ProcessSpec, log_tail, rotate_log, signal_group, spawn

FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0
# After this long a process restarts with the first delay.
_SETTLED_SECONDS = 30.0
# Deaths of a process that was never ready, after which starting fails.
_MAX_EARLY_DEATHS = 3
_POLL_SECONDS = 0.1
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal asked the supervisor to stop while it was waiting."""


class SupervisedProcess:
    """A process that is restarted when it dies."""

    def __init__(self, spec: ProcessSpec, log_path: Path) -> None:
        self.spec = spec
        self.log_path = log_path
        self.process: subprocess.Popen[bytes] | None = None
        self.delay_seconds = FIRST_DELAY_SECONDS
        self.started_at = 0.0
        self.restart_at: float | None = None
        self.num_early_deaths = 0
        self.is_ready = False
        self.was_ready = False


class Supervisor:
    """Starts processes and restarts them until it is stopped; `now` is a monotonic clock in seconds."""

    def __init__(
        self, logs: Path, *, say: Callable[[str], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._logs = logs
        self._say = say
        self._now = now
        self._kept: list[SupervisedProcess] = []
        self._num_stop_signals = 0
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handle INT, TERM, HUP and CHLD during the block. Main thread only."""
        previous = {number: signal.signal(number, self._on_signal) for number in _STOP_SIGNALS}
        # The handler does nothing: the byte in the pipe wakes the loop, which then looks at every process.
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        previous_pipe = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous_pipe)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._num_stop_signals += 1

    @property
    def is_stopping(self) -> bool:
        return self._num_stop_signals > 0

    def pid_of(self, name: str) -> int | None:
        for kept in self._kept:
            if kept.spec.name == name and kept.process is not None:
                return kept.process.pid
        return None

    def start(self, specs: Sequence[ProcessSpec]) -> None:
        """Start processes, without waiting."""
        for spec in specs:
            log_path = self._logs / f"{spec.name}.log"
            rotate_log(log_path)
            kept = SupervisedProcess(spec, log_path)
            self._kept.append(kept)
            self._start_one(kept)

    def run_step(self, step: ProcessSpec) -> None:
        """Run a process to its end while supervising the others.

        Raises:
            StackError: when it fails; holds the end of its log.
            Stopped: when a stop is requested.
        """
        log_path = self._logs / f"{step.name}.log"
        rotate_log(log_path)
        process = spawn(step.command, environment=step.environment, log_path=log_path)
        try:
            while process.poll() is None:
                self._tick()
        finally:
            if process.poll() is None:
                signal_group(process, signal.SIGKILL)
                process.wait()
        if process.returncode != 0:
            raise StackError(
                f"{step.name} failed ({describe_exit(process.returncode)}); its log is {log_path}:\n"
                f"{log_tail(log_path)}"
            )

    def wait_ready(self, names: Sequence[str] | None = None) -> None:
        """Wait until the named processes, or all, have been ready once.

        Raises:
            StackError: when one dies three times before it is ready; holds the end of its log.
            Stopped: when a stop is requested.
        """
        waiting = [kept for kept in self._kept if names is None or kept.spec.name in names]
        reported_at = self._now()
        while any(not kept.was_ready for kept in waiting):
            self._tick()
            if self._now() - reported_at > 15.0:
                reported_at = self._now()
                missing = ", ".join(kept.spec.name for kept in waiting if not kept.was_ready)
                self._say(
                    f"Still waiting for {missing} (the first start compiles kernels for a minute or two); "
                    f"logs are in {self._logs}"
                )

    def keep(self) -> None:
        """Restart processes that die until a stop is requested."""
        with contextlib.suppress(Stopped):
            while True:
                self._tick()

    def _tick(self) -> None:
        """Wait for a poll interval or a signal, then check every process."""
        self._sleep(_POLL_SECONDS)
        if self.is_stopping:
            raise Stopped
        for kept in self._kept:
            self._check(kept)

    def _sleep(self, seconds: float) -> None:
        readable, _, _ = select.select([self._wake_read], [], [], seconds)
        if readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 512)

    def _check(self, kept: SupervisedProcess) -> None:
        if kept.process is None:
            if kept.restart_at is not None and self._now() >= kept.restart_at:
                self._start_one(kept)
            return
        if kept.process.poll() is not None:
            self._on_death(kept, kept.process)
            return
        if not kept.is_ready and kept.spec.is_ready():
            kept.is_ready = True
            if kept.was_ready:
                self._say(f"{kept.spec.name} is back (pid {kept.process.pid})")
            kept.was_ready = True

    def _start_one(self, kept: SupervisedProcess) -> None:
        spec = kept.spec
        if spec.prepare is not None:
            spec.prepare()
        kept.process = spawn(
            spec.command,
            environment=spec.environment,
            log_path=kept.log_path,
            user=spec.user,
            folder=spec.folder,
            death_signal=spec.death_signal,
        )
        kept.started_at = self._now()
        kept.restart_at = None
        kept.is_ready = False

    def _on_death(self, kept: SupervisedProcess, process: "subprocess.Popen[bytes]") -> None:
        # Its process group would otherwise outlive it.
        signal_group(process, signal.SIGKILL)
        kept.process = None
        exit_text = describe_exit(process.returncode)
        if not kept.was_ready:
            kept.num_early_deaths += 1
            if kept.num_early_deaths >= _MAX_EARLY_DEATHS:
                raise StackError(
                    f"{kept.spec.name} does not start ({exit_text}); its log is {kept.log_path}:\n"
                    f"{log_tail(kept.log_path)}"
                )
        if self._now() - kept.started_at >= _SETTLED_SECONDS:
            kept.delay_seconds = FIRST_DELAY_SECONDS
        self._say(f"{kept.spec.name} died ({exit_text}); starting it again in {kept.delay_seconds:g} s")
        kept.restart_at = self._now() + kept.delay_seconds
        kept.delay_seconds = min(2 * kept.delay_seconds, LONGEST_DELAY_SECONDS)

    def stop(self) -> None:
        """Stop every process, stage by stage; kill what overruns. A second signal kills at once."""
        num_signals = self._num_stop_signals
        for stage in sorted({kept.spec.stop_stage for kept in self._kept}):
            running = [
                (kept.spec, kept.process)
                for kept in self._kept
                if kept.spec.stop_stage == stage and kept.process is not None
            ]
            for spec, process in running:
                # Only to the process itself, which stops its own children.
                process.send_signal(spec.stop_signal)
            deadline = self._now() + max((spec.stop_seconds for spec, _ in running), default=0.0)
            while any(process.poll() is None for _, process in running):
                if self._num_stop_signals > num_signals or self._now() > deadline:
                    break
                self._sleep(_POLL_SECONDS)
            for spec, process in running:
                if process.poll() is None:
                    self._say(f"{spec.name} did not stop in time and is killed")
                signal_group(process, signal.SIGKILL)
                process.wait()
        self._kept.clear()


def describe_exit(returncode: int) -> str:
    """Return an exit status in words: `exit code 1` or `killed by SIGKILL`."""
    if returncode >= 0:
        return f"exit code {returncode}"
    return f"killed by {signal.Signals(-returncode).name}"
