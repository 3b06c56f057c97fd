"""The loop: from the first step that is not done to the last, with save points and checkpoints."""

import time
from collections.abc import Callable

import torch

from luthier.core.errors import NonFiniteLossError, TooMuchForgettingError
from luthier.core.events import EvaluatedEvent, Evaluation, Metrics, RunReport, SavePointEvent, StepEvent
from luthier.storage.manifests import Manifest
from luthier.training.job import Job
from luthier.training.loop.early_stopping import Decision, decide
from luthier.training.loop.evaluation import Evaluator
from luthier.training.loop.gradient_accumulation import GradientAccumulator, apply_gradients
from luthier.training.loop.run_stats import Pace, Progress, RunStats, build_report
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


class Loop:
    """Everything that the steps of one run share.

    Args:
        model: the model, restored when a save point was there.
        save_points: where to write them.
        writer: where events go.
        stop: asked between steps.
        machine: where it runs; the type of its weights is kept for the next attempt.
        stats: sums over all attempts.
        clock: seconds from any start, never going back.
    """

    def __init__(
        self,
        job: Job,
        model: JobModel,
        *,
        optimizer: torch.optim.Optimizer,
        save_points: SavePoints,
        publisher: Publisher,
        accumulator: GradientAccumulator,
        evaluator: Evaluator,
        writer: EventWriter,
        stop: StopRequest,
        progress: Progress,
        machine: Machine,
        stats: RunStats,
        log: TrainingLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = job
        self.model = model
        self.machine = machine
        self.step = progress.step
        self.last_metrics = progress.metrics
        self._chosen_metrics = progress.chosen_metrics
        self._unreported = progress.untold
        self._optimizer = optimizer
        self._save_points = save_points
        self._publisher = publisher
        self._accumulator = accumulator
        self._evaluator = evaluator
        self._writer = writer
        self._stop = stop
        self.stats = stats
        self._log = log
        self._clock = clock
        self._last_manifest: Manifest | None = None
        self._next_save_at = clock() + SAVE_POINT_SECONDS
        # A resumed run starts from a save point of its step.
        self._saved_step = progress.step

    def run(self, start_evaluation: Evaluation | None) -> None:
        """Do every step that is left.

        Args:
            start_evaluation: the scores of what training starts from, the base or a tuned model, where they
                can't be taken from the untrained model's.

        Raises:
            StoppedError: when TERM came; a save point of the last step is written.
            NonFiniteLossError: when a step's loss or gradient is no number; that step is not applied.
            OutOfMemoryError: when a step does not fit, however small its parts.
            TooMuchForgettingError: when no checkpoint is below `max_forgetting`.
        """
        plan = self.job.plan
        if self.step == 0:
            self._report_evaluation(start_evaluation or self._evaluate())
        elif self._unreported is not None:
            self._end_epoch(self._unreported)
        elif plan.ends_epoch(self.step) and not self._publisher.checkpoint_folder(self.step).exists():
            # The attempt before had it, but it may not have been taken in time.
            self._checkpoint()
        left = sum(int(row_lengths(self.job.rows)[rows].sum()) for rows in plan.steps[self.step :])
        pace = Pace(self._clock, left)
        self.model.attached.model.train()
        while self.step < plan.num_steps and self._decision.reason is None:
            self._stop_if_asked()
            with self.stats.phase("train"):
                event = self._one_step(pace)
            if plan.ends_epoch(self.step):
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

    def write_result(self) -> tuple[int, Metrics, Manifest]:
        """Make the chosen checkpoint the result, in the run directory's `artifact`.

        Returns:
            Its step, its scores and its manifest.

        Raises:
            SelfCheckError: when what was saved is not what was trained.
        """
        folder, step = self.job.folder / RESULT_NAME, self._decision.result_step
        assert step is not None, "a run without a result has failed before"
        with self.stats.phase("save"):
            if step == self.step:
                manifest = self._publisher.write_result(folder, step, self.last_metrics)
            else:
                manifest = self._publisher.take_chosen(folder, step, self._chosen_metrics)
        self._last_manifest = manifest
        return step, self.last_metrics if step == self.step else self._chosen_metrics, manifest

    def report(self, *, is_finished: bool = False) -> RunReport:
        """Return the report as it stands."""
        manifest, decision = self._last_manifest, self._decision
        is_early = self.step < self.job.plan.num_steps or decision.forgot_too_much
        return build_report(
            self.job,
            self.model,
            self.machine,
            self.stats,
            step=self.step,
            result_step=decision.result_step if is_finished else None,
            stopped_early=decision.reason if is_early else None,
            num_halvings=self._accumulator.num_halvings,
            artifact_bytes=_size(manifest),
            artifact_digest=manifest.digest if is_finished and manifest is not None else None,
        )

    @property
    def _decision(self) -> Decision:
        """What the evaluations so far ask for."""
        return decide(self.job.spec.training, self.stats.evaluations)

    def _one_step(self, pace: Pace) -> StepEvent:
        """Do the next step; return its event."""
        step, plan, options = self.step + 1, self.job.plan, self.job.spec.training
        scores = self._accumulator.compute(step)
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
            self._optimizer,
            scores,
            learning_rate=rate,
            max_grad_norm=options.max_grad_norm,
        )
        self.step = step
        pace.step_done(scores.num_tokens)
        self.stats.step_done(scores.num_tokens, scores.num_supervised)
        return StepEvent(
            job_id=self._writer.job_id,
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
        """Score the model, report the epoch's last step with these scores, write its checkpoint."""
        try:
            evaluation = self._evaluate()
        except StoppedError:
            # The step is done and kept. The next attempt begins with its scores, report and checkpoint.
            self._unreported = event
            self._save()
            raise
        self._unreported = None
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
        self.stats.evaluations.append(evaluation)
        self._checkpoint()
        self._emit_evaluated(evaluation)

    def _evaluate(self) -> Evaluation:
        before = self.stats.evaluations[0].general_loss if self.stats.evaluations else None
        with self.stats.phase("evaluate"):
            return self._evaluator.evaluate(
                self.model, step=self.step, epoch=self.job.plan.epoch_of(self.step), loss_before=before
            )

    def _report_evaluation(self, evaluation: Evaluation) -> None:
        """Keep and report the scores of what training starts from; the log has the base's in any case."""
        base = self.stats.base_evaluation
        named = {"base": evaluation} if base is None else {"base": base, "start": evaluation}
        scores = {f"{name}_{key}": score for name, one in named.items() for key, score in one.scores.items()}
        self._log.append(step=0, **scores)
        self.stats.evaluations.append(evaluation)
        self._emit_evaluated(evaluation)

    def _emit_evaluated(self, evaluation: Evaluation) -> None:
        report = self.report()
        self._writer.emit(EvaluatedEvent(job_id=self._writer.job_id, evaluation=evaluation, report=report))
        if report.stopped_early is not None:
            self._writer.say(report.stopped_early)

    def _checkpoint(self) -> None:
        """Publish the model as it is under its step, unless it has forgotten too much."""
        decision = self._decision
        if decision.forgot_too_much:
            return
        is_chosen = decision.result_step == self.step
        with self.stats.phase("save"):
            self._last_manifest = self._publisher.write_checkpoint(
                self.step, self.last_metrics, is_chosen=is_chosen
            )
        if is_chosen:
            self._chosen_metrics = self.last_metrics

    def _is_save_due(self) -> bool:
        every = self.job.spec.training.save_every_steps
        return self.step % every == 0 if every is not None else self._clock() >= self._next_save_at

    def _stop_if_asked(self) -> None:
        if not self._stop.is_set:
            return
        if self.step > 0:
            self._save()
        raise StoppedError

    def _save(self) -> None:
        """Write a save point of this step, unless there is one: the worker may have taken it already."""
        if self._saved_step == self.step:
            return
        began = self._clock()
        with self.stats.phase("save"):
            folder = self._save_points.write(
                self._progress(), self.model, self._optimizer, self._publisher.chosen_folder
            )
        ended = self._clock()
        self._saved_step = self.step
        self._next_save_at = ended + max(SAVE_POINT_SECONDS, _SAVE_COST_FACTOR * (ended - began))
        self._writer.emit(
            SavePointEvent(
                job_id=self._writer.job_id,
                step=self.step,
                path=folder.relative_to(self.job.folder).as_posix(),
            )
        )

    def _progress(self) -> Progress:
        parts, stats = self._accumulator, self.stats
        return Progress(
            step=self.step,
            metrics=self.last_metrics,
            untold=self._unreported,
            precision=self.machine.precision,
            log=self._log.read(),
            evaluations=stats.evaluations,
            base_evaluation=stats.base_evaluation,
            chosen_metrics=self._chosen_metrics,
            micro_batch_halvings=parts.num_halvings,
            max_part_tokens=parts.max_tokens if parts.num_halvings else None,
            seconds=stats.seconds,
            tokens_seen=stats.tokens_seen,
            supervised_tokens_seen=stats.supervised_tokens_seen,
            peak_memory_bytes=stats.peak_memory_bytes,
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


def _size(manifest: Manifest | None) -> int | None:
    """Return the bytes of what an artifact is, its card and log left out."""
    return None if manifest is None else sum(manifest.files[name].bytes for name in manifest.digested)
