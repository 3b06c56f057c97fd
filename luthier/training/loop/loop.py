"""The loop: from the first step that is not done to the last, with save points and checkpoints."""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from luthier.core.errors import NonFiniteLossError, TooMuchForgettingError
from luthier.core.events import (
    EvaluatedEvent,
    Evaluation,
    FinishedEvent,
    Metrics,
    RunReport,
    SavePointEvent,
    StartedFrom,
    StepEvent,
)
from luthier.storage.manifests import Manifest
from luthier.training.job import Job
from luthier.training.loop.early_stopping import Decision, decide
from luthier.training.loop.evaluation import Evaluator
from luthier.training.loop.gradient_accumulation import GradientAccumulator, apply_gradients
from luthier.training.loop.run_stats import Pace, Progress
from luthier.training.model.batches import row_lengths
from luthier.training.model.device import Machine, peak_memory_bytes
from luthier.training.model.optimizer import learning_rate_at
from luthier.training.model.training_model import JobModel
from luthier.training.output.artifact import TrainingLog
from luthier.training.output.checkpoints import Publisher
from luthier.training.output.resume_state import SavePoints
from luthier.training.process_io import EventWriter, StoppedError, StopRequest

SAVE_POINT_SECONDS = 30.0
# A save point may cost a twentieth of the time at most, however large the model.
_SAVE_COST_FACTOR = 20.0
_NUM_LINES_NAMED = 20
RESULT_NAME = "artifact"
# What decides a result, beside Python.
_PACKAGES = ("luthier", "torch", "transformers", "peft")
# What a report takes from the progress as it is.
_REPORTED = (
    *("evaluations", "base_evaluation", "micro_batch_halvings", "seconds"),
    *("tokens_seen", "supervised_tokens_seen", "peak_memory_bytes"),
)


@dataclass
class Loop:
    """The steps of one run, and everything that they share.

    `model` and `progress` are those of a save point where one was found. `start_evaluation` has the scores of
    what training starts from, the base or a tuned model, where the untrained model's are not those.
    `clock` gives seconds from any start, never going back.
    """

    job: Job
    model: JobModel
    optimizer: torch.optim.Optimizer
    save_points: SavePoints
    publisher: Publisher
    accumulator: GradientAccumulator
    evaluator: Evaluator
    writer: EventWriter
    stop: StopRequest
    progress: Progress
    machine: Machine
    log: TrainingLog
    start_evaluation: Evaluation | None = None
    clock: Callable[[], float] = time.monotonic
    _last_manifest: Manifest | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._next_save_at = self.clock() + SAVE_POINT_SECONDS
        # A resumed run starts from a save point of its step.
        self._saved_step = self.progress.step

    def run(self) -> None:
        """Do every step that is left.

        Raises:
            StoppedError: when TERM came; a save point of the last step is written.
            NonFiniteLossError: when a step's loss or gradient is no number; that step is not applied.
            OutOfMemoryError: when a step does not fit, however small its parts.
            TooMuchForgettingError: when no checkpoint is below `max_forgetting`.
        """
        plan, progress = self.job.plan, self.progress
        if progress.step == 0:
            self._report_evaluation(self.start_evaluation or self._evaluate())
        elif progress.untold is not None:
            self._end_epoch(progress.untold)
        elif plan.ends_epoch(progress.step) and not self.publisher.checkpoint_folder(progress.step).exists():
            # The attempt before had it, but it may not have been taken in time.
            self._checkpoint()
        left = sum(int(row_lengths(self.job.rows)[rows].sum()) for rows in plan.steps[progress.step :])
        pace = Pace(self.clock, left)
        self.model.attached.model.train()
        while progress.step < plan.num_steps and self._decision.reason is None:
            self._stop_if_asked()
            with progress.phase("train"):
                event = self._one_step(pace)
            if plan.ends_epoch(progress.step):
                self._end_epoch(event)
            else:
                self._report_step(event)
            if self._is_save_due():
                self._save()
        if self._decision.result_step is None:
            raise TooMuchForgettingError(
                f"{self._decision.reason} There is no checkpoint below it, so nothing is published. Use a "
                "lower learning rate, fewer epochs, or a higher training.max_forgetting.",
                param="training.max_forgetting",
            )

    def write_result(self, started_at: float) -> FinishedEvent:
        """Make the chosen checkpoint the result, in the run directory's `artifact`.

        Raises:
            SelfCheckError: when what was saved is not what was trained.
        """
        folder, step, progress = self.job.folder / RESULT_NAME, self._decision.result_step, self.progress
        assert step is not None, "a run without a result has failed before"
        metrics = progress.metrics if step == progress.step else progress.chosen_metrics
        with progress.phase("save"):
            write = self.publisher.write_result if step == progress.step else self.publisher.take_chosen
            self._last_manifest = write(folder, step, metrics)
        return FinishedEvent(
            job_id=self.writer.job_id,
            step=step,
            path=RESULT_NAME,
            digest=self._last_manifest.digest,
            metrics=metrics,
            trained_tokens=progress.tokens_seen,
            num_trained_parameters=self.model.attached.num_trained_parameters,
            seconds=time.monotonic() - started_at,
            report=self.report(is_finished=True),
        )

    def report(self, *, is_finished: bool = False) -> RunReport:
        """Return the child's part of the job's report as it stands."""
        job, progress, decision, manifest = self.job, self.progress, self._decision, self._last_manifest
        is_early = progress.step < job.plan.num_steps or decision.forgot_too_much
        base, parent = job.origin.base, job.spec.parent
        progress.note_memory(self.machine.device)
        return RunReport(
            method=self.model.method.name,
            path=self.model.path,
            device=self.machine.device,
            precision=self.machine.precision,
            num_threads=torch.get_num_threads(),
            num_trained_parameters=self.model.attached.num_trained_parameters,
            num_base_parameters=base.num_parameters,
            # The weights and configuration; card and log are left out.
            artifact_bytes=None
            if manifest is None
            else sum(manifest.files[name].bytes for name in manifest.digested),
            full_copy_bytes=base.num_parameters * self.machine.dtype.itemsize,
            started_from=None if parent is None else StartedFrom(name=parent.name, digest=parent.digest),
            steps_done=progress.step,
            steps_planned=job.plan.num_steps,
            result_step=decision.result_step if is_finished else None,
            stopped_early=decision.reason if is_early else None,
            tokens_per_second=progress.tokens_per_second,
            base_digest=base.digest,
            data_sha256=job.data_sha256,
            validation_sha256=job.validation_sha256,
            artifact_digest=manifest.digest if is_finished and manifest is not None else None,
            versions={name: importlib.metadata.version(name) for name in _PACKAGES}
            | {"python": platform.python_version()},
            seed=job.spec.seed,
            spec=job.spec,
            **{name: getattr(progress, name) for name in _REPORTED},
        )

    @property
    def _decision(self) -> Decision:
        """What the evaluations so far ask for."""
        return decide(self.job.spec.training, self.progress.evaluations)

    def _one_step(self, pace: Pace) -> StepEvent:
        """Do the next step; return its event."""
        progress, plan, options = self.progress, self.job.plan, self.job.spec.training
        step = progress.step + 1
        scores = self.accumulator.compute(step)
        if not scores.is_finite:
            raise self._non_finite(step)
        rate = learning_rate_at(
            step,
            num_steps=plan.num_steps,
            peak=self.job.peak_learning_rate,
            warmup_ratio=options.warmup_ratio,
        )
        apply_gradients(
            self.model,
            self.optimizer,
            scores,
            learning_rate=rate,
            max_grad_norm=options.max_grad_norm,
        )
        progress.step = step
        # A step that is repeated after a crash is counted once.
        progress.tokens_seen += scores.num_tokens
        progress.supervised_tokens_seen += scores.num_supervised
        pace.step_done(scores.num_tokens)
        return StepEvent(
            job_id=self.writer.job_id,
            step=step,
            total_steps=plan.num_steps,
            epoch=plan.epoch_of(step),
            metrics=Metrics(
                train_loss=scores.loss,
                train_mean_token_accuracy=scores.accuracy,
                train_reward_accuracy=scores.reward_accuracy,
                train_reward_margin=scores.reward_margin,
            ),
            learning_rate=rate,
            grad_norm=scores.grad_norm,
            num_tokens=scores.num_tokens,
            num_supervised_tokens=scores.num_supervised,
            tokens_per_second=pace.tokens_per_second,
            seconds_left=pace.seconds_left,
            peak_memory_bytes=peak_memory_bytes(self.model.device),
        )

    def _report_step(self, event: StepEvent) -> None:
        self.progress.metrics = event.metrics
        self.log.append(
            step=event.step,
            epoch=event.epoch,
            learning_rate=event.learning_rate,
            grad_norm=event.grad_norm,
            **event.metrics.model_dump(exclude_none=True),
        )
        self.writer.emit(event)

    def _end_epoch(self, event: StepEvent) -> None:
        """Score the model, report the epoch's last step with these scores, write its checkpoint."""
        try:
            evaluation = self._evaluate()
        except StoppedError:
            # The step is done and kept. The next attempt begins with its scores, report and checkpoint.
            self.progress.untold = event
            self._save()
            raise
        self.progress.untold = None
        if evaluation.valid_loss is not None:
            metrics = event.metrics.model_copy(
                update={
                    "full_valid_loss": evaluation.valid_loss,
                    "full_valid_mean_token_accuracy": evaluation.valid_mean_token_accuracy,
                    "full_valid_reward_accuracy": evaluation.valid_reward_accuracy,
                    "full_valid_reward_margin": evaluation.valid_reward_margin,
                }
            )
            event = event.model_copy(update={"metrics": metrics})
        self._report_step(event)
        self.progress.evaluations.append(evaluation)
        self._checkpoint()
        self._emit_evaluated(evaluation)

    def _evaluate(self) -> Evaluation:
        step, evaluations = self.progress.step, self.progress.evaluations
        before = evaluations[0].general_loss if evaluations else None
        with self.progress.phase("evaluate"):
            return self.evaluator.evaluate(
                self.model, step=step, epoch=self.job.plan.epoch_of(step), loss_before=before
            )

    def _report_evaluation(self, evaluation: Evaluation) -> None:
        """Keep and report the scores of what training starts from; the log has the base's in any case."""
        base = self.progress.base_evaluation
        named = {"base": evaluation} if base is None else {"base": base, "start": evaluation}
        scores = {f"{name}_{key}": score for name, one in named.items() for key, score in one.scores.items()}
        self.log.append(step=0, **scores)
        self.progress.evaluations.append(evaluation)
        self._emit_evaluated(evaluation)

    def _emit_evaluated(self, evaluation: Evaluation) -> None:
        report = self.report()
        self.writer.emit(EvaluatedEvent(job_id=self.writer.job_id, evaluation=evaluation, report=report))
        if report.stopped_early is not None:
            self.writer.say(report.stopped_early)

    def _checkpoint(self) -> None:
        """Publish the model as it is under its step, unless it has forgotten too much."""
        decision, progress = self._decision, self.progress
        if decision.forgot_too_much:
            return
        is_chosen = decision.result_step == progress.step
        with progress.phase("save"):
            self._last_manifest = self.publisher.write_checkpoint(
                progress.step, progress.metrics, is_chosen=is_chosen
            )
        if is_chosen:
            progress.chosen_metrics = progress.metrics

    def _is_save_due(self) -> bool:
        every = self.job.spec.training.save_every_steps
        return self.progress.step % every == 0 if every is not None else self.clock() >= self._next_save_at

    def _stop_if_asked(self) -> None:
        if not self.stop.is_set:
            return
        if self.progress.step > 0:
            self._save()
        raise StoppedError

    def _save(self) -> None:
        """Write a save point of this step, unless there is one: the worker may have taken it already."""
        progress = self.progress
        if self._saved_step == progress.step:
            return
        progress.log = self.log.read()
        progress.note_memory(self.machine.device)
        began = self.clock()
        with progress.phase("save"):
            folder = self.save_points.write(
                progress, self.model, self.optimizer, self.publisher.chosen_folder
            )
        ended = self.clock()
        self._saved_step = progress.step
        self._next_save_at = ended + max(SAVE_POINT_SECONDS, _SAVE_COST_FACTOR * (ended - began))
        self.writer.emit(
            SavePointEvent(
                job_id=self.writer.job_id,
                step=progress.step,
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
