"""The loop: from the first step that is not done to the last, with save points and checkpoints."""

import time
from pathlib import Path

import torch

from luthier.core.errors import NonFiniteLossError
from luthier.core.events import CheckpointEvent, EvaluatedEvent, Metrics, SavePointEvent, StepEvent
from luthier.core.reports import Evaluation, RunReport
from luthier.storage.manifests import Manifest
from luthier.training.artifact import LOG_NAME, TrainingLog, write_artifact
from luthier.training.batches import Batch, collate, count_supervised, row_lengths, split_micro
from luthier.training.device import Machine, peak_memory_bytes
from luthier.training.emit import EventWriter
from luthier.training.evaluate import Scores, StoppedError, evaluate
from luthier.training.job import Job
from luthier.training.optimizer import learning_rate_at
from luthier.training.progress import Pace, Progress
from luthier.training.report import Ledger, build_report
from luthier.training.savepoints import SavePoints
from luthier.training.signals import StopRequest
from luthier.training.step import apply_gradients, compute_gradients
from luthier.training.trainee import Trainee

SAVE_POINT_SECONDS = 30.0
_NUM_LINES_NAMED = 20


class Loop:
    """Everything that the steps of one run share.

    Args:
        job: what to train.
        trainee: the model, restored when a save point was there.
        optimizer: over its parameters, restored too.
        save_points: where to write them.
        writer: where events go.
        stop: asked between steps.
        progress: what is done already.
        machine: where it runs; the type of its weights is kept for the next attempt.
        ledger: sums over all attempts.
        max_tokens: bound on a part of a batch with its padding.
        pad_id: token on the right of shorter rows.
        samples: rows on which the trainee's shortcuts are proved before anything is published.
    """

    def __init__(
        self,
        job: Job,
        trainee: Trainee,
        *,
        optimizer: torch.optim.Optimizer,
        save_points: SavePoints,
        writer: EventWriter,
        stop: StopRequest,
        progress: Progress,
        machine: Machine,
        ledger: Ledger,
        max_tokens: int,
        pad_id: int,
        samples: list[Batch],
    ) -> None:
        self.job = job
        self.step = progress.step
        self.last_metrics = progress.metrics
        self._untold = progress.untold
        self._machine = machine
        self._ledger = ledger
        self.trainee = trainee
        self._optimizer = optimizer
        self._save_points = save_points
        self._writer = writer
        self._stop = stop
        self._max_tokens = max_tokens
        self.samples = samples
        self._pad_id = pad_id
        self._lengths = row_lengths(job.rows)
        self._num_supervised = count_supervised(job.rows)
        self._saved_at = time.monotonic()
        self._log = TrainingLog(job.folder / LOG_NAME, progress.log)

    def run(self) -> None:
        """Do every step that is left.

        Raises:
            StoppedError: when TERM came; a save point of the last step is written.
            NonFiniteLossError: when a step's loss or gradient is no number; that step is not applied.
        """
        plan = self.job.plan
        if self.step == 0:
            self._score_base()
        elif self._untold is not None:
            self._end_epoch(self._untold)
        elif plan.ends_epoch(self.step) and not self.checkpoint_folder(self.step).exists():
            # The attempt before had it, but perhaps nobody took it in time.
            self._checkpoint()
        left = sum(int(self._lengths[rows].sum()) for rows in plan.steps[self.step :])
        pace = Pace(time.monotonic, left)
        self.trainee.attached.model.train()
        while self.step < plan.num_steps:
            self._stop_if_asked()
            with self._ledger.phase("train"):
                event = self._one_step(pace)
            if plan.ends_epoch(self.step):
                self._end_epoch(event)
            else:
                self._tell(event)
            if self._is_save_due():
                self._save()

    def checkpoint_folder(self, step: int) -> Path:
        """Return where the checkpoint of a step lies."""
        return self.job.folder / "checkpoints" / f"step-{step:06d}"

    def write_result(self, folder: Path) -> Manifest:
        """Write the model as it is now as an artifact folder, once its shortcuts are proved.

        Args:
            folder: the artifact's final place.

        Returns:
            Its manifest.

        Raises:
            SelfCheckError: when the model that was trained is not the one that would be published.
        """
        self.trainee.prove_shortcuts(self.samples)
        return write_artifact(
            folder,
            self.trainee,
            self.job.origin,
            step=self.step,
            metrics=self.last_metrics,
            log=self._log.path,
        )

    def _one_step(self, pace: Pace) -> StepEvent:
        """Do the next step; return what is to be told of it."""
        step, plan, options = self.step + 1, self.job.plan, self.job.spec.training
        rows = plan.steps[step - 1]
        parts = split_micro(rows, self._lengths, self._max_tokens)
        scores = compute_gradients(
            self.trainee,
            (collate(self.job.rows, part, self._pad_id) for part in parts),
            num_supervised=int(self._num_supervised[rows].sum()),
        )
        if not scores.is_finite:
            raise self._non_finite(step)
        rate = learning_rate_at(
            step,
            num_steps=plan.num_steps,
            peak=self.job.peak_learning_rate,
            warmup_ratio=options.warmup_ratio,
        )
        apply_gradients(
            self.trainee,
            self._optimizer,
            scores,
            learning_rate=rate,
            max_grad_norm=options.max_grad_norm,
        )
        self.step = step
        pace.step_done(scores.num_tokens)
        self._ledger.step_done(scores.num_tokens, scores.num_supervised)
        return StepEvent(
            job_id=self._writer.job_id,
            step=step,
            total_steps=plan.num_steps,
            epoch=plan.epoch_of(step),
            metrics=Metrics(train_loss=scores.loss, train_mean_token_accuracy=scores.accuracy),
            learning_rate=rate,
            grad_norm=scores.grad_norm,
            num_tokens=scores.num_tokens,
            num_supervised_tokens=scores.num_supervised,
            tokens_per_second=pace.tokens_per_second,
            seconds_left=pace.seconds_left,
            peak_memory_bytes=peak_memory_bytes(self.trainee.device),
        )

    def _tell(self, event: StepEvent) -> None:
        self.last_metrics = event.metrics
        self._log.append(
            step=event.step,
            epoch=event.epoch,
            learning_rate=event.learning_rate,
            grad_norm=event.grad_norm,
            **event.metrics.model_dump(exclude_none=True),
        )
        self._writer.emit(event)

    def _end_epoch(self, event: StepEvent) -> None:
        """Score the validation rows, tell the epoch's last step with these scores, make its checkpoint."""
        try:
            scores = self._score_validation()
        except StoppedError:
            # The step is done and kept. The next attempt scores it, tells it and makes its checkpoint first.
            self._untold = event
            self._save()
            raise
        self._untold = None
        if scores is not None:
            metrics = event.metrics.model_copy(
                update={
                    "full_valid_loss": scores.loss,
                    "full_valid_mean_token_accuracy": scores.accuracy,
                }
            )
            event = event.model_copy(update={"metrics": metrics})
        self._tell(event)
        self._checkpoint()
        self._tell_evaluation(scores)

    def report(self, manifest: Manifest | None = None) -> RunReport:
        """Return the report as it stands, with a result's digest and size once there is one."""
        return build_report(
            self.job,
            self.trainee,
            self._machine,
            self._ledger,
            step=self.step,
            result_step=None if manifest is None else self.step,
            artifact_digest=None if manifest is None else manifest.digest,
            artifact_bytes=None
            if manifest is None
            else sum(manifest.files[name].bytes for name in manifest.digested),
        )

    def _tell_evaluation(self, scores: Scores | None) -> None:
        evaluation = Evaluation(
            step=self.step,
            epoch=self.job.plan.epoch_of(self.step),
            valid_loss=None if scores is None else scores.loss,
            valid_mean_token_accuracy=None if scores is None else scores.accuracy,
        )
        self._ledger.evaluations.append(evaluation)
        self._writer.emit(
            EvaluatedEvent(job_id=self._writer.job_id, evaluation=evaluation, report=self.report())
        )

    def _score_base(self) -> None:
        scores = self._score_validation()
        if scores is not None:
            self._log.append(
                step=0, base_valid_loss=scores.loss, base_valid_mean_token_accuracy=scores.accuracy
            )
        self._tell_evaluation(scores)

    def _score_validation(self) -> Scores | None:
        if self.job.validation is None:
            return None
        return evaluate(
            self.trainee,
            self.job.validation,
            max_tokens=self._max_tokens,
            pad_id=self._pad_id,
            should_stop=lambda: self._stop.is_set,
        )

    def _checkpoint(self) -> None:
        """Write the model as it is under its step.

        The folder is left to whoever reads the event: only they know when they have it.
        """
        folder = self.checkpoint_folder(self.step)
        manifest = self.write_result(folder)
        self._writer.emit(
            CheckpointEvent(
                job_id=self._writer.job_id,
                step=self.step,
                path=folder.relative_to(self.job.folder).as_posix(),
                digest=manifest.digest,
                metrics=self.last_metrics,
            )
        )

    def _is_save_due(self) -> bool:
        every = self.job.spec.training.save_every_steps
        if every is not None:
            return self.step % every == 0
        return time.monotonic() - self._saved_at >= SAVE_POINT_SECONDS

    def _stop_if_asked(self) -> None:
        if not self._stop.is_set:
            return
        if self.step > 0:
            self._save()
        raise StoppedError

    def _save(self) -> None:
        progress = Progress(
            step=self.step,
            metrics=self.last_metrics,
            untold=self._untold,
            precision=self._machine.precision,
            log=self._log.read(),
            evaluations=self._ledger.evaluations,
            micro_batch_halvings=self._ledger.micro_batch_halvings,
            seconds=self._ledger.seconds,
            tokens_seen=self._ledger.tokens_seen,
            supervised_tokens_seen=self._ledger.supervised_tokens_seen,
            peak_memory_bytes=self._ledger.peak_memory_bytes,
        )
        folder = self._save_points.write(progress, self.trainee, self._optimizer)
        self._saved_at = time.monotonic()
        self._writer.emit(
            SavePointEvent(
                job_id=self._writer.job_id,
                step=self.step,
                path=folder.relative_to(self.job.folder).as_posix(),
            )
        )

    def _non_finite(self, step: int) -> NonFiniteLossError:
        lines = self.job.lines_of(step)
        named = ", ".join(map(str, lines[:_NUM_LINES_NAMED])) + (
            " …" if len(lines) > _NUM_LINES_NAMED else ""
        )
        return NonFiniteLossError(
            f"Loss or gradient of step {step} is not finite; it trained on lines {named} of the training "
            "file. The step was not applied and nothing is published. Use a lower learning rate, or look at "
            "these lines."
        )
