"""Training runs in this process, quick enough for many: events in a list, kills and faults at any event."""

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

from luthier.core.events import FailedEvent, FinishedEvent, TrainingEvent, parse_event
from luthier.training import build as assemble_module
from luthier.training import run as run_module
from luthier.training.loop import evaluation as general_text_module
from luthier.training.loop.evaluation import general_passages
from luthier.training.process_io import EventWriter, StopRequest
from luthier.training.run import run

# Writes a run directory: its name, and the options of `build_tiny_run`.
Build = Callable[..., Path]
KINDS = frozenset({"started", "step", "evaluated", "checkpoint", "save_point"})


class Killed(BaseException):
    """The end of a process, as far as one process can play it: nothing catches it."""


class _Interrupted(EventWriter):
    """Says an event, then looks whether this was the last."""

    def __init__(self, descriptor: int, job_id: str, after: Callable[[TrainingEvent], None]) -> None:
        super().__init__(descriptor, job_id)
        self._after = after

    def emit(self, event: TrainingEvent) -> None:
        super().emit(event)
        self._after(event)


def run_here(
    folder: Path,
    *,
    kill_after: Callable[[TrainingEvent], bool] | None = None,
    term_after: Callable[[TrainingEvent], bool] | None = None,
    max_tokens: int | None = None,
    num_passages: int = 2,
    is_stopped: bool = False,
) -> list[TrainingEvent]:
    """Run a directory to its end, or until it is killed, and return its events.

    Args:
        folder: the run directory.
        kill_after: ends the run as soon as an event for which it is true is said.
        term_after: asks the run to stop then.
        max_tokens: bound on a micro-batch, instead of the device's.
        num_passages: passages of the general text; all 42 take a tiny base most of a second.
        is_stopped: whether it is asked to stop before it begins.
    """
    stop = StopRequest()
    stop.is_set = is_stopped

    def after(event: TrainingEvent) -> None:
        if term_after is not None and term_after(event):
            stop.is_set = True
        if kill_after is not None and kill_after(event):
            raise Killed

    path = folder / "events.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    passages = general_passages()[:num_passages]
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        stack.enter_context(mock.patch.object(general_text_module, "general_passages", lambda: passages))
        stack.enter_context(
            mock.patch.object(run_module, "EventWriter", lambda fd, job: _Interrupted(fd, job, after))
        )
        if max_tokens is not None:
            stack.enter_context(mock.patch.object(assemble_module, "max_part_tokens", lambda *_: max_tokens))
        with suppress(Killed):
            run(folder, descriptor, stop)
    return [parse_event(line) for line in path.read_bytes().splitlines()]


def run_killed_everywhere(
    folder: Path, *, kinds: frozenset[str] = KINDS, max_tokens: int | None = None
) -> tuple[int, list[TrainingEvent]]:
    """Run a directory in attempts, each of which is killed after an event that was never said before.

    Return the number of kills and what the last attempt, which was not killed, said; `kinds` are the types of
    events after which a kill comes.
    """
    reported: set[tuple[str, int]] = set()

    def is_news(event: TrainingEvent) -> bool:
        name = (event.type, getattr(event, "step", getattr(getattr(event, "evaluation", None), "step", -1)))
        if name in reported or event.type not in kinds:
            return False
        reported.add(name)
        return True

    while True:
        num_reported = len(reported)
        events = run_here(folder, kill_after=is_news, max_tokens=max_tokens)
        if len(reported) == num_reported:
            return num_reported, events


def finished(events: list[TrainingEvent]) -> FinishedEvent:
    """Return the last event, which must be the end of a run that succeeded."""
    assert isinstance(events[-1], FinishedEvent), events[-1]
    return events[-1]


def failed(events: list[TrainingEvent]) -> FailedEvent:
    """Return the last event, which must be the end of a run that failed."""
    assert isinstance(events[-1], FailedEvent), events[-1]
    return events[-1]
