"""The job processes of a worker, which check files and train: one for each training slot, and one more.

Each is a fresh process, never forked from one with threads and a storage client's runtime. It reads Postgres
at every sweep, and sooner when its worker writes to its standard input.
"""

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import IO

import structlog

from luthier.core.errors import LuthierError
from luthier.core.runtime import die_with_parent
from luthier.core.settings import Settings
from services.jobs import leases
from worker.context import WorkerContext, make_context, stop_on_signals
from worker.tasks.prepare import prepare
from worker.tasks.train import claim, train

_log = structlog.get_logger()
# A process that ended is started again, but not over and over at once.
_RESTART_SECONDS = 5.0
_UNCHECKED_AT_ONCE = 20
# What a worker writes to the standard input of its processes.
_WAKE, _READ_CATALOGUE = b"\n", b"c"


def work(context: WorkerContext) -> None:
    """Train what is queued and check the files of what was created, until there is nothing for this process.

    Other processes are woken for a job that was checked here once this one has claimed another, or none: its
    fork server has begun with the imports.
    """
    checked: str | None = None
    while not context.stopping.is_set():
        claimed = claim(context)
        if checked is not None and (claimed is None or claimed.lease.job_id != checked):
            context.notify(checked)
        checked = None
        if claimed is not None:
            train(context, claimed)
            context.start_fork_server()
            continue
        checked = _prepare_next(context)
        if checked is None:
            return
    if checked is not None:
        context.notify(checked)
    if context.fork_server is not None:
        context.fork_server.stop()


def _prepare_next(context: WorkerContext) -> str | None:
    """Check files until a job is queued; return its id, or None when no job is left to check."""
    with context.database.transaction() as session:
        unchecked = leases.list_unchecked(
            session, context.worker_id, limit=_UNCHECKED_AT_ONCE, can_run=context.can_run()
        )
    for job_id in unchecked:
        if context.stopping.is_set():
            return None
        if prepare(context, job_id):
            return job_id
    return None


def run_job_process(settings: Settings, worker_id: str, parent_pid: int, *, has_broker: bool) -> None:
    """Work in a process of a worker until TERM, or until the worker is gone."""
    die_with_parent(parent_pid)
    context = make_context(settings, worker_id=worker_id)
    if not has_broker:
        context.notify = lambda _job_id: None
    # A signal writes a byte there, which ends the wait.
    signalled, on_signal = os.pipe()
    os.set_blocking(on_signal, False)
    signal.set_wakeup_fd(on_signal)
    stop_on_signals(context)
    # Its worker answers it, and passes it on by the standard input.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The first job would wait for its imports otherwise.
    context.start_fork_server()
    while not context.stopping.is_set():
        try:
            work(context)
        except LuthierError as error:
            _log.warning("look put off", reason=error.message)
        ready, _, _ = select.select([0, signalled], [], [], settings.sweep_seconds)
        messages = os.read(0, 4096) if 0 in ready else _WAKE
        if not messages:
            break
        if _READ_CATALOGUE in messages:
            context.read_catalogue()


@dataclass
class _Running:
    process: "subprocess.Popen[bytes]"
    input: IO[bytes]
    started_at: float


class JobProcesses:
    """The job processes of one worker, started again when they end. Use it from the main thread alone."""

    def __init__(self, worker_id: str, num_processes: int, *, has_broker: bool) -> None:
        options = [] if has_broker else ["--no-broker"]
        arguments = [*options, "--process", worker_id, str(os.getpid())]
        self._command = [sys.executable, "-m", "worker", *arguments]
        self._running: list[_Running | None] = [None] * num_processes

    def keep_running(self) -> None:
        """Start what is missing."""
        for index, running in enumerate(self._running):
            if running is not None:
                exit_code = running.process.poll()
                if exit_code is None or time.monotonic() < running.started_at + _RESTART_SECONDS:
                    continue
                _log.error("a process of the worker has ended, another is started", exit_code=exit_code)
                running.input.close()
            # The group is the worker's own: a signal to it reaches all, and each saves first.
            process = subprocess.Popen(self._command, stdin=subprocess.PIPE, bufsize=0)
            assert process.stdin is not None
            os.set_blocking(process.stdin.fileno(), False)
            self._running[index] = _Running(process, process.stdin, time.monotonic())

    def wake(self) -> None:
        """Let each look now."""
        self._send(_WAKE)

    def read_catalogue(self) -> None:
        """Let each take the catalogue as it is now, once it has nothing else to do."""
        self._send(_READ_CATALOGUE)

    def _send(self, message: bytes) -> None:
        for running in self._running:
            try:
                if running is not None:
                    running.input.write(message)
            except (BlockingIOError, BrokenPipeError):
                # It has not read the last ones yet, or has just ended.
                continue

    def stop(self) -> None:
        """Stop all and wait: a training process finishes its step and saves first."""
        running = [one.process for one in self._running if one is not None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
