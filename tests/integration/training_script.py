"""A stand-in for the training process: it says what a test wrote down, and has made the folders it names."""

from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.core.events import (
    CheckpointEvent,
    EvaluatedEvent,
    Evaluation,
    FinishedEvent,
    Metrics,
    PhaseSeconds,
    RunReport,
    SampleAnswer,
    SavePointEvent,
    StartedEvent,
    StepEvent,
    TrainingEvent,
)
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.storage.manifests import seal_folder
from worker.context import WorkerContext
from worker.heartbeat import lease_heartbeat
from worker.tasks.train import Claimed, claim, make_run
from worker.training_process.supervisor import Ending
from worker.training_process.tracking import Tracking

# The base of jobs that no process trains.
BASE_FACTS = BaseFacts(
    id="tiny-llama",
    source="path:x",
    licence="x",
    digest="sha256:0",
    tokenizer_digest="sha256:0",
    context_length=256,
    num_parameters=1,
    num_layers=1,
    hidden_size=1,
)


class ScriptedChild:
    """A process that has said everything already; it duck-types worker.training_process.child.TrainingChild.

    Args:
        events: what it says, one at each look.
    """

    def __init__(self, events: Sequence[TrainingEvent]) -> None:
        self._left = list(events)

    def poll_events(self, timeout_seconds: float) -> list[TrainingEvent]:
        return [self._left.pop(0)] if self._left else []

    def exit_code(self) -> int | None:
        return None if self._left else 0

    def kill_group(self) -> None: ...

    def ask_to_stop(self) -> None: ...


class Script:
    """Writes the events of one attempt, and their folders into its run directory.

    Args:
        job_id: whose.
        spec: resolved.
        run_dir: the attempt's.
        steps_an_epoch: after this number of steps there is an evaluation and a checkpoint.
        num_epochs: how many are planned.
    """

    def __init__(
        self, job_id: str, spec: TrainingSpec, run_dir: Path, *, steps_an_epoch: int, num_epochs: int
    ) -> None:
        self.job_id = job_id
        self.spec = spec
        self.run_dir = run_dir
        self.steps_an_epoch = steps_an_epoch
        self.num_steps = steps_an_epoch * num_epochs
        # What its artifacts hold, beside their step: another word makes other digests.
        self.weights = "weights"
        self.events: list[TrainingEvent] = []
        self.evaluations: list[Evaluation] = []

    def start(self, step: int = 0) -> "Script":
        self.events.append(
            StartedEvent(
                job_id=self.job_id,
                device="cpu",
                precision="float32",
                start_step=step,
                total_steps=self.num_steps,
                num_trained_parameters=4,
                load_seconds=1.0,
            )
        )
        if step == 0:
            self.evaluate(0, 9.0)
        return self

    def epoch(self, epoch: int, valid_loss: float) -> "Script":
        """One epoch: its steps, the evaluation of its end, its checkpoint; epochs count from 1."""
        last = epoch * self.steps_an_epoch
        for step in range(last - self.steps_an_epoch + 1, last + 1):
            metrics = Metrics(
                train_loss=1 / step,
                train_mean_token_accuracy=0.5,
                full_valid_loss=valid_loss if step == last else None,
                full_valid_mean_token_accuracy=0.25 if step == last else None,
            )
            self.events.append(self.step(step, metrics))
        digest = self._seal(f"checkpoints/step-{last:06d}", last)
        path = f"checkpoints/step-{last:06d}"
        self.events.append(
            CheckpointEvent(job_id=self.job_id, step=last, path=path, digest=digest, metrics=metrics)
        )
        self.evaluate(last, valid_loss)
        return self

    def save_point(self, step: int, content: str) -> "Script":
        """A save point, which may have been said before with other content."""
        path = f"save_points/step-{step:06d}"
        building = self.run_dir / "save_points" / ".building"
        building.mkdir(parents=True)
        (building / "state.json").write_text(content)
        seal_folder(building, self.run_dir / path)
        self.events.append(SavePointEvent(job_id=self.job_id, step=step, path=path))
        return self

    def evaluate(self, step: int, valid_loss: float) -> None:
        answer = SampleAnswer(prompt="who?", answer=f"\x00 secret words of step {step}")
        evaluation = Evaluation(
            step=step,
            epoch=step / self.steps_an_epoch,
            valid_loss=valid_loss,
            general_loss=3.0,
            forgetting=0.125 if step else 0.0,
            answers=[answer],
        )
        self.evaluations.append(evaluation)
        self.events.append(
            EvaluatedEvent(job_id=self.job_id, evaluation=evaluation, report=self.report(step))
        )

    def finish(self, epoch: int, *, stopped_early: str | None = None) -> "Script":
        """The checkpoint of an epoch is the result."""
        step = epoch * self.steps_an_epoch
        self.events.append(
            FinishedEvent(
                job_id=self.job_id,
                step=step,
                path="artifact",
                digest=self._seal("artifact", step),
                metrics=Metrics(train_loss=0.001),
                trained_tokens=1000,
                num_trained_parameters=4,
                seconds=2.0,
                report=self.report(step, result_step=step, stopped_early=stopped_early),
            )
        )
        return self

    def report(
        self, step: int, *, result_step: int | None = None, stopped_early: str | None = None
    ) -> RunReport:
        assert self.spec.base is not None
        return RunReport(
            method="lora",
            path="plain",
            device="cpu",
            precision="float32",
            num_threads=1,
            num_trained_parameters=4,
            num_base_parameters=self.spec.base.num_parameters,
            full_copy_bytes=100,
            evaluations=self.evaluations,
            steps_done=step,
            steps_planned=self.num_steps,
            result_step=result_step,
            stopped_early=stopped_early,
            seconds=PhaseSeconds(load=1.0, train=2.0),
            base_digest=self.spec.base.digest,
            data_sha256="0" * 64,
            seed=1,
            spec=self.spec,
        )

    def step(self, step: int, metrics: Metrics) -> StepEvent:
        return StepEvent(
            job_id=self.job_id,
            step=step,
            total_steps=self.num_steps,
            epoch=step / self.steps_an_epoch,
            metrics=metrics,
            learning_rate=0.1,
            grad_norm=1.0,
            num_tokens=10,
            num_supervised_tokens=5,
            tokens_per_second=100.0,
            seconds_left=1.0,
            peak_memory_bytes=1,
        )

    def _seal(self, path: str, step: int) -> str:
        """Make an artifact whose digest is that of its step, and whose card is this attempt's."""
        building = self.run_dir / "building"
        building.mkdir(parents=True)
        (building / "adapter_model.safetensors").write_bytes(f"{self.weights} of step {step}".encode())
        (building / "README.md").write_text(f"made in {self.run_dir.name} as {path}")
        final = self.run_dir / path
        final.parent.mkdir(exist_ok=True)
        return seal_folder(
            building, final, digested=["adapter_model.safetensors"], base_digest=self.spec.ground_digest
        ).digest


def run_script(
    context: WorkerContext,
    folder: Path,
    write: Callable[[Script], object],
    *,
    steps: int = 1,
    epochs: int = 1,
    claimed: Claimed | None = None,
    tracking: Tracking | None = None,
) -> Ending:
    """Claim the next queued job, unless one is given, and run it with a scripted process."""
    claimed = claimed or claim(context)
    assert claimed is not None
    run_dir = folder / f"e{claimed.lease.fencing_token}"
    script = Script(claimed.lease.job_id, claimed.spec, run_dir, steps_an_epoch=steps, num_epochs=epochs)
    write(script)
    with lease_heartbeat(context, claimed.lease) as heartbeat:
        run = make_run(context, claimed, run_dir, heartbeat, tracking)
        return run.supervise(ScriptedChild(script.events))  # type: ignore[arg-type]
