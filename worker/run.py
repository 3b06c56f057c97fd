"""Supervising one training process: its events into the job, its folders into storage, signals back to it."""

import contextlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import func
from sqlalchemy.orm import Session

from db.tables import Job, UsageEvent
from luthier.core import errors
from luthier.core.errors import ArtifactCorruptError, JobError, UnavailableError, WorkerCrashedError
from luthier.core.events import (
    BaseScoredEvent,
    CheckpointEvent,
    FailedEvent,
    FinishedEvent,
    MessageEvent,
    SavePointEvent,
    StartedEvent,
    StepEvent,
    StoppedEvent,
    TrainingEvent,
)
from luthier.core.ids import new_id
from luthier.core.specs import TrainingSpec
from luthier.core.states import JobStatus
from luthier.storage.manifests import Manifest
from services import events, leases, models
from services.events import NewEvent
from services.leases import Lease
from worker.child import TrainingChild
from worker.context import WorkerContext
from worker.keeper import LeaseKeeper

T = TypeVar("T")

# Metrics are written in batches, at most two a second.
_FLUSH_SECONDS = 0.5
_MAX_STOP_SECONDS = 30.0
_NUM_SAVE_POINTS = 2
# Two minutes in all: a run of hours is not given up for a restart of storage or database.
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, *[15.0] * 7)
_NUM_CHECKPOINTS = 3


class Ending(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    GIVEN_BACK = "given_back"
    CRASHED = "crashed"


def _job_error(event: FailedEvent) -> JobError:
    classes = {
        cls.code: cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, JobError)
    }
    return classes.get(event.code, JobError)(event.message, param=event.param)


@dataclass
class TrainingRun:
    """One attempt at a job.

    Args:
        context: the worker's parts.
        lease: the claim; all writes are under its fence.
        spec: what is trained.
        model_name: the name that the result will bear.
        prefix: storage prefix of this attempt's objects.
        run_dir: the run directory.
        keeper: keeps the lease meanwhile, and knows when it is lost.
    """

    context: WorkerContext
    lease: Lease
    spec: TrainingSpec
    model_name: str
    prefix: str
    run_dir: Path
    keeper: LeaseKeeper
    _news: list[NewEvent] = field(default_factory=list)
    _columns: dict[str, Any] = field(default_factory=dict)
    _step: int = 0
    _total_steps: int = 0
    _ending: Ending | None = None
    _stop_asked_at: float | None = None
    _failure: JobError | None = None

    def supervise(self, child: TrainingChild) -> Ending:
        """Follow a training process until it has ended and what it made is published.

        Args:
            child: the running process.

        Returns:
            How the attempt ended; the job's row already says so.

        Raises:
            LeaseLostError: when the job was cancelled or taken away; the child is then to be killed.
            LuthierError: when the job must fail.
        """
        flushed_at = 0.0
        while (exit_code := child.exit_code()) is None:
            for event in child.poll_events(_FLUSH_SECONDS):
                self._take(event)
            now = time.monotonic()
            if now - flushed_at >= _FLUSH_SECONDS and self._has_news():
                self._flush()
                flushed_at = now
            self.keeper.check()
            self._pass_on_stop(child, now)
        if self._ending is not None:
            return self._ending
        self.keeper.check()
        return self._end_without_a_word(exit_code)

    def _has_news(self) -> bool:
        return bool(self._news or self._columns)

    def _pass_on_stop(self, child: TrainingChild, now: float) -> None:
        if not self.context.stopping.is_set():
            return
        if self._stop_asked_at is None:
            self._stop_asked_at = now
            child.ask_to_stop()
            self._write(lambda session: leases.note_stopping(session, self.lease))
        elif now - self._stop_asked_at > _MAX_STOP_SECONDS:
            child.kill()

    def _flush(self, session: Session | None = None) -> None:
        """Write gathered events and columns, in the given transaction or one of their own."""
        if session is not None:
            leases.update_job(session, self.lease, **(self._columns or {"step": Job.step}))
            events.append(session, self.lease.job_id, self._news)
            return
        try:
            with self.context.database.transaction() as own:
                self._flush(own)
        except UnavailableError:
            # Kept, and written once the database is back.
            return
        self._forget()

    def _forget(self) -> None:
        self._news, self._columns = [], {}

    def _take(self, event: TrainingEvent) -> None:
        match event:
            case StartedEvent():
                self._started(event)
            case BaseScoredEvent():
                message = f"Base model: validation loss={event.valid_loss:.2f}"
                data = event.model_dump(exclude={"job_id", "type"})
                self._news.append(NewEvent(message, data={"base": data}))
            case StepEvent():
                self._stepped(event)
            case SavePointEvent():
                self._save(event)
            case CheckpointEvent():
                self._publish_checkpoint(event)
            case FinishedEvent():
                self._publish_result(event)
            case StoppedEvent():
                self._stopped(event)
            case MessageEvent():
                self._news.append(NewEvent(event.message, level=event.level, data={}))
            case FailedEvent():
                self._flush()
                if not event.is_retryable:
                    raise _job_error(event)
                self._failure = _job_error(event)

    def _started(self, event: StartedEvent) -> None:
        self._step, self._total_steps = event.start_step, event.total_steps
        self._write(lambda session: leases.note_start(session, self.lease, event.start_step))
        self._columns |= {"total_steps": event.total_steps, "step": event.start_step}
        if event.start_step > 0:
            message = f"Going on from the save point at step {event.start_step} of {event.total_steps}"
            self._news.append(NewEvent(message, data={"step": event.start_step}))

    def _stepped(self, event: StepEvent) -> None:
        self._step = event.step
        metrics = event.metrics.model_dump(exclude_none=True)
        message = f"Step {event.step}/{event.total_steps}: training loss={metrics.get('train_loss', 0):.2f}"
        if "valid_loss" in metrics:
            message += f", validation loss={metrics['valid_loss']:.2f}"
        if "full_valid_loss" in metrics:
            message += f", full validation loss={metrics['full_valid_loss']:.2f}"
        data = event.model_dump(exclude={"job_id", "type", "metrics"}) | metrics
        self._news.append(NewEvent(message, type="metrics", data=data))
        self._columns |= {
            "step": event.step,
            "estimated_finish_at": func.now() + timedelta(seconds=event.seconds_left),
        }

    def _save(self, event: SavePointEvent) -> None:
        """Keep a save point where another worker finds it, and drop the ones before the last two."""
        key = f"{self.prefix}/save_points/step-{event.step:06d}"
        try:
            self.context.storage.put_folder(self.run_dir / event.path, key)
            dropped = self._record_save_point(key, event.step)
        except UnavailableError as error:
            told = f"The save point at step {event.step} was not kept: {error.message}"
            self._news.append(NewEvent(told, level="warn", data={}))
        except (ArtifactCorruptError, FileNotFoundError):
            # The process drops old save points on its own, and has dropped this one while it was copied: a
            # newer one is on its way, and the one before still stands.
            self._drop([key])
        else:
            self._drop(dropped)

    def _record_save_point(self, key: str, step: int) -> list[str]:
        with self.context.database.transaction() as session:
            job = session.get_one(Job, self.lease.job_id, with_for_update=True)
            save_points = [*job.save_points, {"key": key, "step": step}]
            leases.update_job(session, self.lease, save_points=save_points[-_NUM_SAVE_POINTS:])
        return [str(dropped["key"]) for dropped in save_points[:-_NUM_SAVE_POINTS]]

    def _drop(self, prefixes: list[str]) -> None:
        """Delete what is no longer needed; what stays because storage is away is tidied after the job."""
        with contextlib.suppress(UnavailableError):
            for prefix in prefixes:
                self.context.storage.delete_prefix(prefix)

    def _write(self, write: Callable[[Session], T]) -> T:
        """Run a transaction, again after a pause while the database is away, as long as the lease holds."""
        for pause_seconds in _PAUSES_SECONDS:
            try:
                with self.context.database.transaction() as session:
                    return write(session)
            except UnavailableError:
                time.sleep(pause_seconds)
                self.keeper.check()
        with self.context.database.transaction() as session:
            return write(session)

    def _publish(self, folder: Path, key: str) -> Manifest:
        """Put a folder into storage, again after a pause while storage is away; the lease is kept."""
        for pause_seconds in _PAUSES_SECONDS:
            try:
                return self.context.storage.put_folder(folder, key)
            except UnavailableError:
                time.sleep(pause_seconds)
                self.keeper.check()
        return self.context.storage.put_folder(folder, key)

    def _publish_checkpoint(self, event: CheckpointEvent) -> None:
        if event.step == self._total_steps:
            # The last checkpoint is the model itself; it is registered with the result.
            return
        key = f"{self.prefix}/checkpoints/step-{event.step:06d}"
        manifest = self._publish(self.run_dir / event.path, key)
        retired = self._write(lambda session: self._register_checkpoint(session, event, key, manifest.digest))
        self._forget()
        shutil.rmtree(self.run_dir / event.path)
        self._drop(retired)

    def _register_checkpoint(
        self, session: Session, event: CheckpointEvent, key: str, digest: str
    ) -> list[str]:
        self._flush(session)
        job = session.get_one(Job, self.lease.job_id)
        fresh = models.make_name(job.base_id, self.model_name.split(":")[2], job.suffix)
        checkpoint = models.register(
            session,
            job,
            self.spec,
            name=f"{fresh}:ckpt-step-{event.step}",
            kind="checkpoint",
            step=event.step,
            artifact_key=key,
            artifact_digest=digest,
            metrics={"step": event.step} | event.metrics.model_dump(exclude_none=True),
        )
        name = models.get_name(session, checkpoint.model_id)
        told = f"Checkpoint created at step {event.step} with Snapshot ID: {name}"
        events.append(session, self.lease.job_id, [NewEvent(told, data={})])
        return models.retire_checkpoints(session, self.lease.job_id, keep=_NUM_CHECKPOINTS)

    def _publish_result(self, event: FinishedEvent) -> None:
        """Bytes first, manifest last, then one fenced transaction that makes the model exist."""
        key = f"{self.prefix}/artifact"
        manifest = self._publish(self.run_dir / event.path, key)
        retired = self._write(lambda session: self._register_result(session, event, key, manifest.digest))
        self._forget()
        self._ending = Ending.SUCCEEDED
        self._drop(retired)

    def _register_result(self, session: Session, event: FinishedEvent, key: str, digest: str) -> list[str]:
        self._flush(session)
        job = session.get_one(Job, self.lease.job_id)
        models.register(
            session,
            job,
            self.spec,
            name=self.model_name,
            kind="tuned",
            step=event.step,
            artifact_key=key,
            artifact_digest=digest,
            metrics={"step": event.step} | event.metrics.model_dump(exclude_none=True),
        )
        retired = models.retire_checkpoints(session, self.lease.job_id, keep=_NUM_CHECKPOINTS)
        session.add(
            UsageEvent(
                id=new_id("event"),
                organization_id=job.organization_id,
                project_id=job.project_id,
                created_by_key_id=job.created_by_key_id,
                kind="training",
                quantity=event.trained_tokens,
                unit="tokens",
                job_id=job.id,
                model=self.model_name,
            )
        )
        snapshot = f"Checkpoint created at step {event.step} with Snapshot ID: {self.model_name}"
        created = f"New fine-tuned model created: {self.model_name}"
        events.append(session, self.lease.job_id, [NewEvent(snapshot, data={}), NewEvent(created, data={})])
        leases.leave(
            session,
            self.lease,
            JobStatus.SUCCEEDED,
            outcome="succeeded",
            event=NewEvent("The job has successfully completed", data={}),
            fine_tuned_model=self.model_name,
            trained_tokens=event.trained_tokens,
        )
        return retired

    def _stopped(self, event: StoppedEvent) -> None:
        told = f"The worker is stopping; the job waits for another at step {event.step}"
        self._ending = self._give_back(told)

    def _give_back(self, told: str) -> Ending:
        def write(session: Session) -> None:
            self._flush(session)
            event = NewEvent(told, data={})
            leases.leave(session, self.lease, JobStatus.QUEUED, outcome="given_back", event=event)

        self._write(write)
        self._forget()
        return Ending.GIVEN_BACK

    def _end_without_a_word(self, exit_code: int) -> Ending:
        if self._has_news():
            self._flush()
        if self._stop_asked_at is not None:
            # It was asked to stop before its first step, or ran out of time to: nobody's crash.
            return self._give_back("The worker is stopping; the job waits for another")
        how = f"by signal {-exit_code}" if exit_code < 0 else f"with exit code {exit_code}"
        error = self._failure or WorkerCrashedError(
            f"The training process ended {how} after step {self._step}."
        )
        max_attempts = self.context.settings.max_attempts
        status = self._write(
            lambda session: leases.retry_or_fail(session, self.lease, error, max_attempts=max_attempts)
        )
        return Ending.FAILED if status is JobStatus.FAILED else Ending.CRASHED
