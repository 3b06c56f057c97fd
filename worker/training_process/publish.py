"""Publishing what a training process makes: save points, checkpoints, the result, the step metrics.

Bytes first, manifest last, then one short transaction under the lease's fence. A checkpoint is registered as
it comes and at most three are kept. The one whose weights become the model gets the model's name in the
end: the last one, unless the process chose another.
"""

import contextlib
import csv
import hashlib
import io
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from db.tables import Job, UsageEvent
from luthier.core.errors import ArtifactCorruptError, SelfCheckError, StorageFullError, UnavailableError
from luthier.core.events import CheckpointEvent, Evaluation, FinishedEvent, SavePointEvent
from luthier.core.ids import new_id
from luthier.core.specs import TrainingOptions, TrainingSpec
from luthier.core.states import JobStatus
from luthier.storage.manifests import Manifest
from luthier.storage.store import Storage
from luthier.training.loop.early_stopping import decide
from services.files import files
from services.files.files import StoredFile
from services.jobs import events, leases, reports
from services.jobs.events import NewEvent
from services.jobs.leases import Lease
from services.models import models
from worker.training_process.event_buffer import EventBuffer

_NUM_SAVE_POINTS = 2
_NUM_CHECKPOINTS = 3
FILENAME = "step_metrics.csv"
# The classic guide says train_accuracy, newer servers train_mean_token_accuracy: readers of both find theirs.
COLUMNS = (
    "step",
    "train_loss",
    "train_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "train_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)
# What a job on preferences measures beside.
REWARD_COLUMNS = (
    "train_reward_accuracy",
    "train_reward_margin",
    "full_valid_reward_accuracy",
    "full_valid_reward_margin",
)


def _leading_step(options: TrainingOptions, report: dict[str, Any] | None) -> int | None:
    """Return the step that would be the result if training ended now, by the training process's own rule."""
    run = (report or {}).get("run") or {}
    evaluations = [Evaluation.model_validate(evaluation) for evaluation in run.get("evaluations", [])]
    return decide(options, evaluations).result_step


@dataclass
class Publisher:
    """Puts the output of one attempt into storage, and writes the rows that make it exist."""

    storage: Storage
    event_buffer: EventBuffer
    lease: Lease
    spec: TrainingSpec
    model_name: str
    prefix: str
    run_dir: Path
    tokenize_seconds: float
    # The last step's checkpoint waits: most often it is the result itself, and then not published twice.
    _held: CheckpointEvent | None = field(default=None, init=False)
    # Keys that the job's row names: only trimming the row deletes their bytes.
    _kept_save_points: set[str] = field(default_factory=set, init=False)

    def save_point(self, event: SavePointEvent, *, is_needed: bool = False) -> None:
        """Keep a save point where another worker finds it, and drop the ones before the last two."""
        key = f"{self.prefix}/save_points/step-{event.step:06d}"

        def keep() -> list[str]:
            self.storage.put_folder(self._folder(event.path), key)
            return self.event_buffer.write_once(partial(self._record_save_point, key=key, step=event.step))

        try:
            dropped = self.event_buffer.with_retries(keep) if is_needed else keep()
        except (UnavailableError, StorageFullError) as error:
            message = f"The save point at step {event.step} was not kept: {error.message}"
            self.event_buffer.add(message, level="warn")
        except (ArtifactCorruptError, FileNotFoundError):
            # The process drops old save points on its own, and has dropped this one while it was copied: a
            # newer one is on its way, and the one before still stands.
            if key not in self._kept_save_points:
                self._drop([key])
        else:
            self._kept_save_points.add(key)
            self._drop(dropped)

    def _folder(self, path: str) -> Path:
        """Return a folder that the process names, which must be in its run directory."""
        folder = self.run_dir / path
        if not folder.resolve().is_relative_to(self.run_dir.resolve()) or ".." in Path(path).parts:
            raise SelfCheckError("The training process named a folder outside of its run directory.")
        return folder

    def _record_save_point(self, session: Session, *, key: str, step: int) -> list[str]:
        job = session.get_one(Job, self.lease.job_id, with_for_update=True)
        others = [kept for kept in job.save_points if kept["key"] != key]
        save_points = [*others, {"key": key, "step": step}]
        # The note of its step may still wait to be written, and is never if the job stops here.
        reached = max(job.step, step)
        is_newer = all(int(str(kept["step"])) < step for kept in others)
        progress = leases.PROGRESS if is_newer else {}
        kept_points = save_points[-_NUM_SAVE_POINTS:]
        leases.update_job(session, self.lease, save_points=kept_points, step=reached, **progress)
        return [str(dropped["key"]) for dropped in save_points[:-_NUM_SAVE_POINTS]]

    def checkpoint(self, event: CheckpointEvent, *, total_steps: int) -> None:
        """Make a checkpoint callable; the last step's waits for the word which one is the result."""
        if event.step == total_steps:
            self._held = event
            return
        self._publish_checkpoint(event, result_step=None)

    def _publish_checkpoint(self, event: CheckpointEvent, result_step: int | None) -> None:
        key = f"{self.prefix}/checkpoints/step-{event.step:06d}"
        folder = self._folder(event.path)
        manifest = self._publish(folder, key)
        retired = self.event_buffer.write(
            lambda session: self._register_checkpoint(session, event, key, manifest.digest, result_step)
        )
        shutil.rmtree(folder)
        self._drop(retired)

    def _register_checkpoint(
        self, session: Session, event: CheckpointEvent, key: str, digest: str, result_step: int | None
    ) -> list[str]:
        job = self._fenced_job(session)
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
        # One that is done again after a crash may have been retired or deleted before, and stays so.
        if checkpoint.deleted_at is None:
            name = models.get_name(session, checkpoint.model_id)
            message = f"Checkpoint created at step {event.step} with Snapshot ID: {name}"
            events.append(session, job.id, [NewEvent(message, data={})])
        spared = result_step or _leading_step(self.spec.training, job.report)
        return models.retire_checkpoints(
            session, self.lease.job_id, keep=_NUM_CHECKPOINTS, spared_step=spared
        )

    def _fenced_job(self, session: Session) -> Job:
        """Return the job as this transaction has left it, once it is sure that it is still ours."""
        leases.update_job(session, self.lease, step=Job.step)
        return session.get_one(Job, self.lease.job_id, populate_existing=True)

    def result(self, event: FinishedEvent) -> None:
        """Publish the model and the step metrics; the job has succeeded in the same transaction."""
        if self._held is not None and self._held.step != event.step:
            self._publish_checkpoint(self._held, result_step=event.step)
        # The table is made of what is in the database, so that holds all steps first.
        steps = self.event_buffer.write(lambda session: events.list_step_metrics(session, self.lease.job_id))
        table = self._store_step_metrics(steps)
        dropped = self.event_buffer.write(lambda session: self._reuse_checkpoint(session, event, table))
        if dropped is None:
            key = f"{self.prefix}/artifact"
            manifest = self._publish(self._folder(event.path), key)
            dropped = self.event_buffer.write(
                lambda session: self._register_result(session, event, table, key, manifest.digest)
            )
        self._drop(dropped)

    def _store_step_metrics(self, steps: list[dict[str, Any]]) -> StoredFile:
        content, num_rows = build_step_metrics(steps)
        # Under the attempt's prefix: what a crash leaves without a row is collected after the job.
        key = f"{self.prefix}/{FILENAME}"
        self.event_buffer.with_retries(lambda: self.storage.put_bytes(key, content))
        return StoredFile(
            id=new_id("file"),
            filename=FILENAME,
            purpose=files.RESULTS_PURPOSE,
            num_bytes=len(content),
            num_rows=num_rows,
            sha256=hashlib.sha256(content).hexdigest(),
            storage_key=key,
        )

    def _reuse_checkpoint(
        self, session: Session, event: FinishedEvent, table: StoredFile
    ) -> list[str] | None:
        """Let a checkpoint that this attempt has published be the model; None when there is none."""
        found = models.find_checkpoint(session, self.lease.job_id, event.step)
        if found is None:
            return None
        _, model = found
        # An earlier attempt's has another name on its card.
        is_ours = model.artifact_key.startswith(f"{self.prefix}/")
        if not is_ours or model.artifact_digest != event.digest:
            return None
        return self._register_result(session, event, table, model.artifact_key, model.artifact_digest)

    def _register_result(
        self, session: Session, event: FinishedEvent, table: StoredFile, key: str, digest: str
    ) -> list[str]:
        job = self._fenced_job(session)
        before = models.find_checkpoint(session, job.id, event.step)
        key_before = before[1].artifact_key if before is not None else key
        # A checkpoint's own scores stand; those of the end may be of a later step.
        metrics = {"step": event.step} | event.metrics.model_dump(exclude_none=True)
        models.register(
            session,
            job,
            self.spec,
            name=self.model_name,
            kind="tuned",
            step=event.step,
            artifact_key=key,
            artifact_digest=digest,
            metrics=metrics if before is None else before[0].metrics,
        )
        # One that others continue is no checkpoint any more, and keeps its bytes.
        is_same = before is not None and before[1].artifact_key == key
        retired = models.retire_checkpoints(session, job.id, keep=_NUM_CHECKPOINTS, spared_step=event.step)
        self._count_usage(session, job, event.trained_tokens)
        self._append_result_events(session, event, is_new=not is_same)
        result_file = files.record(session, job, table)
        leases.leave(
            session,
            self.lease,
            JobStatus.SUCCEEDED,
            outcome="succeeded",
            event=NewEvent("The job has successfully completed", data={}),
            fine_tuned_model=self.model_name,
            trained_tokens=event.trained_tokens,
            result_file_id=result_file.id,
            report=reports.with_run(event.report, self.tokenize_seconds),
        )
        return [*retired, *([key_before] if is_same and key_before != key else [])]

    def _count_usage(self, session: Session, job: Job, trained_tokens: int) -> None:
        session.add(
            UsageEvent(
                id=new_id("event"),
                organization_id=job.organization_id,
                project_id=job.project_id,
                created_by_key_id=job.created_by_key_id,
                kind="training",
                quantity=trained_tokens,
                unit="tokens",
                job_id=job.id,
                model=self.model_name,
            )
        )

    def _append_result_events(self, session: Session, event: FinishedEvent, *, is_new: bool) -> None:
        snapshot = f"Checkpoint created at step {event.step} with Snapshot ID: {self.model_name}"
        if not is_new:
            snapshot = f"The checkpoint of step {event.step} is the model, now under the model's name"
        created = f"New fine-tuned model created: {self.model_name}"
        events.append(session, self.lease.job_id, [NewEvent(snapshot, data={}), NewEvent(created, data={})])

    def _publish(self, folder: Path, key: str) -> Manifest:
        """Put a folder into storage, again after a pause while storage is away; the lease is kept."""
        return self.event_buffer.with_retries(lambda: self.storage.put_folder(folder, key))

    def _drop(self, prefixes: list[str]) -> None:
        """Delete what is no longer needed; what stays because storage is away is collected after the job."""
        with contextlib.suppress(UnavailableError):
            for prefix in prefixes:
                self.storage.delete_prefix(prefix)


def build_step_metrics(steps: Iterable[Mapping[str, Any]]) -> tuple[bytes, int]:
    """Return the CSV with a header, and its number of rows. A cell is empty where nothing was measured."""
    steps = list(steps)
    has_rewards = any("train_reward_margin" in step for step in steps)
    columns = COLUMNS + (REWARD_COLUMNS if has_rewards else ())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    num_rows = 0
    for step in steps:
        values = {
            "train_accuracy": step.get("train_mean_token_accuracy"),
            "valid_loss": step.get("full_valid_loss"),
            "valid_mean_token_accuracy": step.get("full_valid_mean_token_accuracy"),
            **step,
        }
        writer.writerow([values.get(column) for column in columns])
        num_rows += 1
    return text.getvalue().encode(), num_rows
