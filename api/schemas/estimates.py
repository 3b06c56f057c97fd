"""The estimate of a job: rows, tokens, steps, seconds, bytes."""

from typing import Any

from pydantic import Field

from api.schemas.base import Body
from luthier.core.specs import Auto, Hyperparameters, TrainingOptions
from services.capacity.estimates import Estimate, Grounds


class EstimateRows(Body):
    """Rows of the training file; of a sample all but `total` and `counted` are shares of the whole."""

    total: int
    counted: int = Field(description="Rows whose tokens were counted one by one.")
    is_sampled: bool
    train: int
    validation: int
    too_long: int = Field(description="Longer than training.max_length.")
    faulty: int = Field(description="Refused by the base's template, or without a supervised token.")


class EstimateSeconds(Body):
    """Seconds of the training process by phase."""

    total: float
    load: float
    train: float
    evaluate: float
    save: float


class EstimateBasis(Body):
    """What seconds and memory are computed from."""

    device: str
    precision: str
    num_threads: int
    finished_jobs: int = Field(
        description="Finished jobs on this base and device; 0: only the device was measured."
    )


class JobEstimate(Body):
    """Answer of POST /v1/fine_tuning/jobs/estimate. Tokens are of one epoch, `trained_tokens` of all."""

    object: str = "fine_tuning.job.estimate"
    model: str
    training_file: str
    validation_file: str | None
    rows: EstimateRows
    tokens: int
    supervised_tokens: int
    trained_tokens: int
    steps: int
    hyperparameters: Hyperparameters
    beta: float | Auto | None = Field(description="Of method dpo; null otherwise.")
    tuning: dict[str, Any]
    training: TrainingOptions
    num_trained_parameters: int
    artifact_bytes: int | None
    seconds: EstimateSeconds | None
    peak_memory_bytes: int | None
    basis: EstimateBasis | None
    reason: str | None = Field(description="Why seconds and memory are null.")
    warnings: list[str]


def estimate_object(found: Estimate, training_file: str, validation_file: str | None) -> JobEstimate:
    """Return an estimate as clients see it."""
    return JobEstimate(
        model=found.spec.base_id,
        training_file=training_file,
        validation_file=validation_file,
        rows=EstimateRows(
            total=found.num_rows,
            counted=found.num_counted,
            is_sampled=found.num_counted < found.num_rows,
            train=found.num_train_rows,
            validation=found.num_validation_rows,
            too_long=found.num_too_long,
            faulty=found.num_faulty,
        ),
        tokens=found.num_tokens,
        supervised_tokens=found.num_supervised_tokens,
        trained_tokens=found.num_trained_tokens,
        steps=found.num_steps,
        hyperparameters=found.spec.hyperparameters,
        beta=None if found.spec.dpo is None else found.spec.dpo.beta,
        tuning=found.spec.tuning,
        training=found.spec.training,
        num_trained_parameters=found.num_trained_parameters,
        artifact_bytes=found.artifact_bytes,
        seconds=_seconds(found),
        peak_memory_bytes=found.peak_memory_bytes,
        basis=_basis(found.grounds),
        reason=found.reason,
        warnings=found.warnings,
    )


def _seconds(found: Estimate) -> EstimateSeconds | None:
    if found.seconds is None:
        return None
    phases = found.seconds.model_dump(exclude={"tokenize"})
    return EstimateSeconds(
        total=round(sum(phases.values()), 2), **{k: round(v, 2) for k, v in phases.items()}
    )


def _basis(grounds: Grounds | None) -> EstimateBasis | None:
    if grounds is None:
        return None
    device = grounds.device
    return EstimateBasis(
        device=device.device,
        precision=device.precision,
        num_threads=device.num_threads,
        finished_jobs=len(grounds.finished),
    )
