"""What the training process exchanges with its worker: SIGTERM in, event lines out."""

import os
import signal
import sys
import time
from types import FrameType

from luthier.core.events import MessageEvent, ProgressEvent, TrainingEvent


class StoppedError(Exception):
    """TERM came in the middle of something that can be done again after a resume."""


class StopRequest:
    """Remembers that TERM came; the loop asks between steps.

    `leave_at_once` is true while there is nothing to save (a process that waits for runs).
    """

    def __init__(self) -> None:
        self.is_set = False
        self.leave_at_once = False

    def install(self) -> "StopRequest":
        """Take over TERM in this process; must run on the main thread, before slow imports."""
        signal.signal(signal.SIGTERM, self._on_term)
        return self

    def _on_term(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.is_set = True
        if self.leave_at_once:
            raise SystemExit(0)


_PROGRESS_SECONDS = 15.0


class EventWriter:
    """Writes events of one job to a descriptor, one JSON object a line, each in one piece."""

    def __init__(self, descriptor: int, job_id: str) -> None:
        self.job_id = job_id
        self._descriptor = descriptor
        self._emitted_at = time.monotonic()

    def emit(self, event: TrainingEvent) -> None:
        """Write one event; what was not measured is left out."""
        self._emitted_at = time.monotonic()
        line = event.model_dump_json(exclude_none=True).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]

    def note_progress(self) -> None:
        """Write that work continues, unless something was written a moment ago."""
        if time.monotonic() - self._emitted_at >= _PROGRESS_SECONDS:
            self.emit(ProgressEvent(job_id=self.job_id))

    def say(self, message: str, level: str = "info") -> None:
        self.emit(MessageEvent.model_validate({"job_id": self.job_id, "level": level, "message": message}))


def take_stdout() -> int:
    """Keep standard output for events alone and send everything that others print to standard error.

    Returns:
        A private descriptor for the events, not inherited by child processes.
    """
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    return private
