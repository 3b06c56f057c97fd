"""One training by the product's own training process over a run directory, as a worker would start it."""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.recipes import Recipe
from benchmarks.quality.task import Task
from luthier.core.events import FailedEvent, FinishedEvent, StepEvent, parse_event
from luthier.core.specs import BaseFacts, Hyperparameters, RunInputs, TrainingOptions, TrainingSpec
from luthier.data.prepare.preparation import prepare_rows
from luthier.data.prepare.prepared_rows import write_prepared
from luthier.methods._tuning import check_tuning, resolve_spec

# Failures that say something about the settings and not about the machine: they are results.
_DIVERGED = {"non_finite_loss", "self_check_failed"}


@dataclass(frozen=True)
class Base:
    """A fetched base."""

    facts: BaseFacts
    folder: Path


class DivergedError(Exception):
    """The settings led to no usable model; the message is the error's code."""


@dataclass(frozen=True)
class Trained:
    """What a training made and cost: the artifact's folder, and facts for the table."""

    folder: Path
    facts: dict[str, Any]


def train(
    run: Path,
    task: Task,
    *,
    method: str,
    recipe: Recipe | None,
    seed: int,
    num_epochs: int | None,
    base: Base,
    num_threads: int,
) -> Trained:
    """Train one model.

    Args:
        run: the run directory, which must not exist.
        task: its rows are trained on.
        method: the method's name.
        recipe: hand-set values; None for "auto".
        seed: of order and first values.
        num_epochs: passes; None for what "auto" takes, with a recipe too, so that steps are equal.
        base: the base.
        num_threads: CPU threads.

    Returns:
        The artifact, and what it cost.

    Raises:
        DivergedError: when training ended without a usable model because of the settings.
    """
    run.mkdir(parents=True)
    data = run / "rows.jsonl"
    data.write_text("".join(f"{row.to_line()}\n" for row in task.rows), encoding="utf-8")
    rows, prepared = prepare_rows(data, base.folder, max_length=1024, too_long="error", purpose="training")
    write_prepared(rows, run / "train.safetensors")

    def resolve(spec: TrainingSpec) -> TrainingSpec:
        return resolve_spec(
            spec,
            base=base.facts,
            num_rows=prepared.num_rows,
            num_tokens=prepared.num_tokens,
            num_threads=num_threads,
        )

    automatic = TrainingSpec(
        base_id=base.facts.id,
        tuning=check_tuning({"type": method}),
        hyperparameters=Hyperparameters(n_epochs=num_epochs or "auto"),
        seed=seed,
    )
    spec = resolve(automatic)
    if recipe is not None:
        spec = resolve(with_recipe(spec, recipe, task))
    (run / "spec.json").write_text(spec.model_dump_json())
    inputs = RunInputs(job_id="quality", model_name="quality", base_path=str(base.folder), device="cpu")
    (run / "inputs.json").write_text(inputs.model_dump_json())
    begin, processor_begin = time.perf_counter(), _children_seconds()
    finished, last_step = _run_child(run, num_threads)
    facts = _facts(finished, last_step, time.perf_counter() - begin)
    # On a machine that does other work too, what the processors spent says more than the clock.
    facts["processor_seconds"] = _children_seconds() - processor_begin
    return Trained(run / finished.path, facts)


def with_recipe(automatic: TrainingSpec, recipe: Recipe, task: Task) -> TrainingSpec:
    """Return hand-set values for the epochs and the batch size that "auto" took."""
    return automatic.model_copy(
        update={
            "tuning": check_tuning(recipe.tuning_for(task.description)),
            "training": TrainingOptions(learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay),
        }
    )


def _children_seconds() -> float:
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _run_child(run: Path, num_threads: int) -> tuple[FinishedEvent, StepEvent | None]:
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    last_step: StepEvent | None = None
    finished: FinishedEvent | None = None
    failed: FailedEvent | None = None
    with (
        (run / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.training", str(run)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                event = parse_event(line)
                if isinstance(event, StepEvent):
                    last_step = event
                elif isinstance(event, FinishedEvent):
                    finished = event
                elif isinstance(event, FailedEvent):
                    failed = event
        except BaseException:
            # A measurement that is stopped leaves no training behind.
            process.kill()
            raise
    if failed is not None and failed.code in _DIVERGED:
        raise DivergedError(failed.code)
    if finished is None or process.returncode != 0:
        said = failed.message if failed is not None else (run / "log").read_text()[-2000:]
        raise SystemExit(f"the training failed: {said}")
    return finished, last_step


def _facts(finished: FinishedEvent, last_step: StepEvent | None, wall_seconds: float) -> dict[str, Any]:
    report = finished.report
    scored = [e for e in report.evaluations if e.step == finished.step and e.forgetting is not None]
    return {
        "forgetting": scored[-1].forgetting if scored else None,
        "num_parameters": finished.num_trained_parameters,
        "artifact_bytes": report.artifact_bytes,
        "full_copy_bytes": report.full_copy_bytes,
        "train_seconds": report.seconds.train,
        "seconds": report.seconds.model_dump(),
        "wall_seconds": wall_seconds,
        "peak_memory_bytes": report.peak_memory_bytes,
        "num_steps": finished.step,
        "last_train_loss": None if last_step is None else last_step.metrics.train_loss,
        "path": report.path,
        "precision": report.precision,
        "tuning": report.spec.tuning,
        "hyperparameters": report.spec.hyperparameters.model_dump(),
        "learning_rate": report.spec.training.learning_rate,
        "data_sha256": report.data_sha256,
        "artifact_digest": finished.digest,
        "versions": report.versions,
    }
