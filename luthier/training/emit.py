"""The child's voice: event lines on what was standard output, and nothing else ever on it."""

import os
import sys
import time

from luthier.core.events import MessageEvent, ProgressEvent, TrainingEvent

_PROGRESS_SECONDS = 15.0


class EventWriter:
    """Writes events of one job, one JSON object a line, each in one piece.

    Args:
        descriptor: an open file descriptor; stays open.
        job_id: the job that every event bears.
    """

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
        """Write that work goes on, unless something was written a moment ago."""
        if time.monotonic() - self._emitted_at >= _PROGRESS_SECONDS:
            self.emit(ProgressEvent(job_id=self.job_id))

    def say(self, message: str, level: str = "info") -> None:
        """Write a sentence for the user."""
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
