"""The process that checks a job's files (luthier/data/prepare/process.py), followed until its answer.

It is ended at once when the job is cancelled, when the worker stops, and when it makes no progress.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import time
from pathlib import Path

import msgspec

from luthier.core.errors import StalledError, WorkerCrashedError, make_job_error
from luthier.core.runtime import bare_environment, tied_python
from luthier.data.prepare.process import ANSWER_NAME, QUESTION_NAME, Answer, Prepared, Question, out_of_memory
from worker.context import WorkerContext
from worker.heartbeat import STALL_FACTOR, LeaseHeartbeat

_LOOK_SECONDS = 0.5
_LOG_NAME = "prepare.log"
_READ_BYTES = 4096


class StoppedError(Exception):
    """The worker stops, and the check with it: another worker begins it again."""


def run_prepare(
    context: WorkerContext, heartbeat: LeaseHeartbeat, folder: Path, question: Question
) -> Prepared:
    """Prepare the files in a folder; from the main thread, to which the kernel ties the process's life.

    Raises:
        JobError: when the files can't be used, or take too much memory.
        StalledError: when nothing went on for too long.
        WorkerCrashedError: when the process ended without an answer.
        StoppedError: when the worker stops.
    """
    (folder / QUESTION_NAME).write_bytes(msgspec.json.encode(question))
    with (folder / _LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            tied_python("-m", "luthier.data.prepare.process", str(folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=bare_environment() | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        _follow(context, heartbeat, process)
        exit_code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if exit_code == -signal.SIGABRT:
        # How a library that is not Python's ends where it gets no memory.
        raise out_of_memory(question.max_memory_bytes)
    if exit_code != 0:
        raise WorkerCrashedError(f"The process that checks the job's files ended with exit code {exit_code}.")
    answer = msgspec.json.decode((folder / ANSWER_NAME).read_bytes(), type=Answer)
    if answer.failure is not None:
        raise make_job_error(answer.failure.code, answer.failure.message, answer.failure.param)
    assert answer.prepared is not None
    return answer.prepared


def _follow(context: WorkerContext, heartbeat: LeaseHeartbeat, process: "subprocess.Popen[bytes]") -> None:
    """Return once the process has closed its output."""
    assert process.stdout is not None
    progress_at, longest_silence = time.monotonic(), 0.0
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            is_there = selector.select(_LOOK_SECONDS)
            now = time.monotonic()
            if is_there:
                if not os.read(process.stdout.fileno(), _READ_BYTES):
                    return
                longest_silence = max(longest_silence, now - progress_at)
                progress_at = now
            heartbeat.check()
            if context.stopping.is_set():
                raise StoppedError
            stall_seconds = max(context.settings.stall_seconds, STALL_FACTOR * longest_silence)
            if now - progress_at > stall_seconds:
                raise StalledError(
                    f"The check of the job's files made no progress for {stall_seconds:.0f} s and was ended "
                    "(LUTHIER_STALL_SECONDS)."
                )
