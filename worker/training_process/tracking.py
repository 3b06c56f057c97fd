"""Trackers of an attempt, each in its own thread behind a bounded queue.

A tracker that is slow, away or broken costs the job one line in its events, and no time.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from pydantic import ValidationError

from db.tables import Job
from luthier.core.errors import LuthierError
from luthier.core.events import EvaluatedEvent, StepEvent, TrainingEvent
from luthier.core.logs import origin
from luthier.core.settings import Settings
from luthier.core.specs import TrainingSpec
from luthier.core.states import JobStatus
from luthier.trackers import discover
from luthier.trackers.base import RunStatus, TrackedRun, Tracker, TrackerConfig
from services.jobs.leases import Lease
from worker.context import WorkerContext

_log = structlog.get_logger()

_MAX_WAITING = 1000
# In all, for trackers that still have something to write when the attempt is over.
_LAST_WORDS_SECONDS = 5.0

_STATUS: dict[str, RunStatus] = {
    JobStatus.SUCCEEDED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "cancelled",
}


class TrackerThread:
    """One tracker at work, or broken and silent."""

    def __init__(self, tracker: Tracker, config: TrackerConfig, run: TrackedRun, settings: Settings) -> None:
        self.name = tracker.name
        # Why nothing, or not all, is written; set once.
        self.fault: str | None = None
        self.is_fault_reported = False
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | RunStatus] = queue.Queue(_MAX_WAITING)
        self._thread = threading.Thread(
            target=self._follow, args=(tracker, config, run, settings), daemon=True
        )
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Have something written soon; returns at once, whatever the tracker does."""
        try:
            self._waiting.put_nowait((step, metrics))
        except queue.Full:
            self.fault = self.fault or "it is too slow, and some steps are left out"

    def end(self, status: RunStatus) -> None:
        """Let it write what waits, and then end the run."""
        with contextlib.suppress(queue.Empty):
            # One that lags makes room for the word that it is over, or its thread would wait for ever.
            if self._waiting.full():
                self._waiting.get_nowait()
        self._waiting.put_nowait(status)

    def join(self, timeout_seconds: float) -> None:
        """Wait for its last words, no longer than a while."""
        self._thread.join(timeout_seconds)

    def _follow(self, tracker: Tracker, config: TrackerConfig, run: TrackedRun, settings: Settings) -> None:
        try:
            opened = tracker.open(config, run, settings)
            while not isinstance(item := self._waiting.get(), str):
                opened.log(*item)
            opened.close(item)
        except (Exception, SystemExit) as error:  # noqa: BLE001
            # Answered by a line in the job's events. Its text may hold an address or a key.
            self.fault = self.fault or f"it has failed with {type(error).__name__}"
            _log.warning("tracker failed", tracker=self.name, job_id=run.job_id, **origin(error))


class Tracking:
    """The trackers of one attempt."""

    def __init__(self, threads: Sequence[TrackerThread], find_status: Callable[[], RunStatus]) -> None:
        self._threads = threads
        self._find_status = find_status

    def take(self, event: TrainingEvent, *, add_event: Callable[..., Any]) -> None:
        """Pass an event's metrics to the trackers, and report each one that fails once."""
        if not self._threads:
            return
        measured = _measured(event)
        for thread in self._threads:
            if measured is not None:
                thread.log(*measured)
            if thread.fault is not None and not thread.is_fault_reported:
                thread.is_fault_reported = True
                add_event(
                    f"The integration {thread.name} does not follow this job: {thread.fault}", level="warn"
                )

    def end(self) -> None:
        """End every run by what became of the job; waits for no tracker longer than a few seconds."""
        if not self._threads:
            return
        status = self._find_status()
        for thread in self._threads:
            thread.end(status)
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _measured(event: TrainingEvent) -> tuple[int, dict[str, float]] | None:
    if isinstance(event, StepEvent):
        facts = event.model_dump(include={"epoch", "learning_rate", "grad_norm", "tokens_per_second"})
        return event.step, event.metrics.model_dump(exclude_none=True) | facts
    if isinstance(event, EvaluatedEvent):
        # Answers are a user's text and ours.
        scores = event.evaluation.model_dump(exclude={"step", "epoch", "answers"}, exclude_none=True)
        return (event.evaluation.step, scores) if scores else None
    return None


def start_tracking(
    context: WorkerContext,
    lease: Lease,
    project_id: str,
    spec: TrainingSpec,
    integrations: Sequence[Mapping[str, Any]],
) -> Tracking:
    """Begin to follow an attempt."""
    run = TrackedRun(lease.job_id, project_id, spec.base_id, _parameters(spec))
    trackers = discover()
    threads = []
    for wanted in integrations:
        try:
            tracker = trackers[wanted["type"]]
            config = tracker.Config.model_validate(wanted[tracker.name])
        except (KeyError, ValidationError) as error:
            # Made by another version of this code: no reason to fail the job.
            _log.warning("integration not understood", job_id=lease.job_id, **origin(error))
            continue
        threads.append(TrackerThread(tracker, config, run, context.settings))

    def find_status() -> RunStatus:
        try:
            with context.database.transaction() as session:
                return _STATUS.get(session.get_one(Job, lease.job_id).status, "interrupted")
        except LuthierError:
            return "interrupted"

    return Tracking(threads, find_status)


def _parameters(spec: TrainingSpec) -> dict[str, Any]:
    """Return what decides the result, without the sample prompts and `init_text`, which are a user's text."""
    training = spec.training.model_dump(mode="json", exclude={"sample_prompts"})
    facts = {
        **spec.hyperparameters.model_dump(mode="json"),
        "seed": spec.seed,
        "objective": "supervised" if spec.dpo is None else "dpo",
        **{f"tuning.{name}": value for name, value in spec.tuning.items() if name != "init_text"},
        **{f"training.{name}": value for name, value in training.items()},
    }
    if spec.dpo is not None:
        facts["dpo.beta"] = spec.dpo.beta
    for role, model in (("parent", spec.parent), ("foundation", spec.foundation)):
        if model is not None:
            facts[role], facts[f"{role}.digest"] = model.name, model.digest
    return facts
