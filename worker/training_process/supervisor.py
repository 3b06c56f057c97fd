"""Supervising a training process: its events into the job, its folders to the publisher, signals to it."""

import contextlib
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from sqlalchemy import func
from sqlalchemy.orm import Session

from luthier.core.errors import JobError, StalledError, WorkerCrashedError, make_job_error
from luthier.core.events import (
    CheckpointEvent,
    EvaluatedEvent,
    Evaluation,
    FailedEvent,
    FinishedEvent,
    MessageEvent,
    ProgressEvent,
    SavePointEvent,
    StartedEvent,
    StepEvent,
    StoppedEvent,
    TrainingEvent,
)
from luthier.core.runtime import CHILD_LOG_NAME
from luthier.core.states import JobStatus
from services.capacity import workers
from services.jobs import attempts, leases, pausing, reports
from services.jobs.leases import Lease
from worker.attempt import REQUEUED_ERRORS
from worker.context import WorkerContext
from worker.heartbeat import LeaseHeartbeat, StallTimer
from worker.quarantine import check_machine
from worker.training_process.child import TrainingChild
from worker.training_process.event_buffer import EventBuffer
from worker.training_process.publish import Publisher
from worker.training_process.tracking import Tracking

# Metrics are written in batches, at most two a second.
_FLUSH_SECONDS = 0.5
_MAX_LOG_BYTES = 16 * 1024 * 1024


class Ending(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REQUEUED = "given_back"
    PAUSED = "paused"
    CRASHED = "crashed"


def _scores_message(evaluation: Evaluation, whose: str) -> str | None:
    """Return an evaluation as a sentence, or None when nothing was measured. Answers are no scores."""
    scores = {
        "validation loss": evaluation.valid_loss,
        # Rewards and forgetting are measured from step 0, where they say nothing.
        "reward accuracy": evaluation.valid_reward_accuracy if evaluation.step else None,
        "reward margin": evaluation.valid_reward_margin if evaluation.step else None,
        "general loss": evaluation.general_loss,
        "forgetting": evaluation.forgetting if evaluation.step else None,
    }
    shown = ", ".join(f"{name}={score:z.2f}" for name, score in scores.items() if score is not None)
    if not shown:
        return None
    return f"{whose}: {shown}"


def _list_evaluations(event: EvaluatedEvent) -> list[tuple[str, str, Evaluation]]:
    """Return the evaluations that an event brings: whose scores they are, their name in data, and they."""
    evaluation, started_from = event.evaluation, event.report.started_from
    if evaluation.step > 0:
        return [(f"Evaluation at step {evaluation.step}", "evaluation", evaluation)]
    base = event.report.base_evaluation
    if started_from is None or base is None:
        return [("Base model", "base", evaluation)]
    return [("Base model", "base", base), (f"Start, {started_from.name}", "start", evaluation)]


@dataclass
class TrainingRun:
    """One attempt at a job, followed by its supervisor."""

    context: WorkerContext
    lease: Lease
    heartbeat: LeaseHeartbeat
    event_buffer: EventBuffer
    publisher: Publisher
    tracking: Tracking | None = None
    _step: int = field(default=0, init=False)
    _has_started: bool = field(default=False, init=False)
    _total_steps: int = field(default=0, init=False)
    _ending: Ending | None = field(default=None, init=False)
    _is_stop_asked: bool = field(default=False, init=False)
    _worker_stops_at: float | None = field(default=None, init=False)
    _failure: JobError | None = field(default=None, init=False)

    def supervise(self, child: TrainingChild) -> Ending:
        """Follow a training process until it has ended and its output is published."""
        flushed_at = 0.0
        timer = StallTimer(self.context.settings.stall_seconds)
        while (exit_code := child.exit_code()) is None:
            for event in child.poll_events(_FLUSH_SECONDS):
                came_at = time.monotonic()
                self._take(event)
                # Once asked to stop it was to finish one step and save. Storing an artifact is no silence.
                if not (self._is_stop_asked and isinstance(event, StepEvent | ProgressEvent)):
                    timer.note_progress(came_at)
            if self._ending is not None:
                # The lease is given up, so there is nothing left to keep; the process has said all it had to.
                return self._ending
            now = time.monotonic()
            self._cap_log()
            if now - flushed_at >= _FLUSH_SECONDS and not self.event_buffer.is_empty:
                self.event_buffer.flush()
                flushed_at = now
            self.heartbeat.check()
            self._pass_on_stop(child, now)
            if timer.is_over(now):
                child.kill_group()
                return self._end_stalled(timer.limit_seconds)
        self.heartbeat.check()
        return self._end_without_event(exit_code)

    def _end_stalled(self, silent_seconds: float) -> Ending:
        self.event_buffer.flush()
        if self._is_stop_asked:
            return self._end_stopped()
        return self._retry_or_fail(
            StalledError(
                f"Training made no progress for {silent_seconds:.0f} s after step {self._step}, and was "
                "ended (LUTHIER_STALL_SECONDS)."
            )
        )

    def _cap_log(self) -> None:
        """Empty the process's log where it has grown too large."""
        log = self.publisher.run_dir / CHILD_LOG_NAME
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > _MAX_LOG_BYTES:
                # The process appends, so it continues at the new end.
                os.truncate(log, 0)

    def _pass_on_stop(self, child: TrainingChild, now: float) -> None:
        is_worker_stopping = self.context.stopping.is_set()
        if not self._is_stop_asked and (is_worker_stopping or self.heartbeat.is_pause_asked):
            self._is_stop_asked = True
            child.ask_to_stop()
            job_id, fencing_token = self.lease.job_id, self.lease.fencing_token
            self.event_buffer.write(lambda session: attempts.note_stopping(session, job_id, fencing_token))
        if not is_worker_stopping:
            # A pause may take as long as a step and its save point do, but may not stall.
            return
        if self._worker_stops_at is None:
            self._worker_stops_at = now + self.context.settings.stop_seconds
        elif now > self._worker_stops_at:
            child.kill_group()

    def _take(self, event: TrainingEvent) -> None:
        if self.tracking is not None:
            self.tracking.take(event, add_event=self.event_buffer.add)
        match event:
            case StartedEvent():
                self._started(event)
            case EvaluatedEvent():
                self._evaluated(event)
            case StepEvent():
                self._stepped(event)
            case SavePointEvent():
                self.publisher.save_point(event, is_needed=self.heartbeat.is_pause_asked)
            case CheckpointEvent():
                self.publisher.checkpoint(event, total_steps=self._total_steps)
            case FinishedEvent():
                self.publisher.result(event)
                self._ending = Ending.SUCCEEDED
            case StoppedEvent():
                self._ending = self._end_stopped()
            case ProgressEvent():
                pass
            case MessageEvent():
                self.event_buffer.add(event.message, level=event.level)
            case FailedEvent():
                self.event_buffer.flush()
                if not event.is_retryable:
                    raise make_job_error(event.code, event.message, event.param)
                self._failure = make_job_error(event.code, event.message, event.param)

    def _started(self, event: StartedEvent) -> None:
        self._has_started = True
        self._step, self._total_steps = event.start_step, event.total_steps
        job_id, fencing_token = self.lease.job_id, self.lease.fencing_token

        def note(session: Session) -> None:
            attempts.note_start(session, job_id, fencing_token, event.start_step)
            workers.note_life(session, self.lease.worker_id)

        self.event_buffer.write(note)
        self.event_buffer.note(total_steps=event.total_steps, step=event.start_step)
        if event.start_step > 0:
            message = f"Resuming from the save point at step {event.start_step} of {event.total_steps}"
            self.event_buffer.add(message, data={"step": event.start_step})

    def _evaluated(self, event: EvaluatedEvent) -> None:
        """Keep the report, and append the scores as events; the model's answers are in the report only."""
        self.event_buffer.note(report=reports.with_run(event.report, self.publisher.tokenize_seconds))
        for whose, name, evaluation in _list_evaluations(event):
            message = _scores_message(evaluation, whose)
            if message is not None:
                scores = evaluation.model_dump(exclude={"answers"}, exclude_none=True)
                self.event_buffer.add(message, data={name: scores})

    def _stepped(self, event: StepEvent) -> None:
        self._step = event.step
        metrics = event.metrics.model_dump(exclude_none=True)
        message = f"Step {event.step}/{event.total_steps}: training loss={metrics.get('train_loss', 0):.2f}"
        if "valid_loss" in metrics:
            message += f", validation loss={metrics['valid_loss']:.2f}"
        if "full_valid_loss" in metrics:
            message += f", full validation loss={metrics['full_valid_loss']:.2f}"
        data = event.model_dump(exclude={"job_id", "type", "metrics"}) | metrics
        self.event_buffer.add(message, type="metrics", data=data)
        finish = func.now() + timedelta(seconds=event.seconds_left)
        self.event_buffer.note(step=event.step, estimated_finish_at=finish)

    def _end_stopped(self) -> Ending:
        status = self.event_buffer.write(lambda session: pausing.end_stopped(session, self.lease))
        return Ending.PAUSED if status is JobStatus.PAUSED else Ending.REQUEUED

    def _crash(self, session: Session, error: JobError) -> JobStatus:
        settings = self.context.settings
        status = leases.retry_or_fail(
            session,
            self.lease,
            error,
            max_attempts=settings.max_attempts,
            pause_seconds=settings.sweep_seconds,
        )
        if not self._has_started:
            workers.note_death(
                session, self.lease.worker_id, self.lease.job_id, pause_seconds=settings.lease_seconds
            )
        return status

    def _end_without_event(self, exit_code: int) -> Ending:
        self.event_buffer.flush()
        if self._is_stop_asked or self.heartbeat.is_pause_asked:
            # It was asked to stop before its first step, or ran out of time to: not a crash.
            return self._end_stopped()
        if not self._has_started and self._failure is None:
            check_machine(self.context)
        how = f"by signal {-exit_code}" if exit_code < 0 else f"with exit code {exit_code}"
        return self._retry_or_fail(
            self._failure or WorkerCrashedError(f"The training process ended {how} after step {self._step}.")
        )

    def _retry_or_fail(self, error: JobError) -> Ending:
        if isinstance(error, REQUEUED_ERRORS):
            raise error
        status = self.event_buffer.write(lambda session: self._crash(session, error))
        return Ending.FAILED if status is JobStatus.FAILED else Ending.CRASHED
