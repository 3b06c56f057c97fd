"""Fine-tuning jobs and methods: OpenAI's shapes, with our `tuning` and `training` beside them."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from api.schemas.base import Answer, Body, Timestamp
from db.tables import Checkpoint, Job
from luthier.core.errors import InvalidValueError, UnsupportedValueError
from luthier.core.events import RunReport
from luthier.core.specs import Auto, DpoOptions, Hyperparameters, TrainingOptions, TrainingSpec
from luthier.methods._tuning import MAX_BETA
from services.capacity.estimates import Estimate
from services.jobs.jobs import NewJob
from services.jobs.reports import PrepareReport

_MAX_SEED = 2**31 - 1
# Fields that real clients send and that mean nothing here (Azure's choice of a machine pool); all other
# unknown fields are refused. Those of chats are in the inference server: luthier/inference/openai/fields.py.
IGNORED_JOB_FIELDS = frozenset({"trainingType"})


class HyperparametersBody(Body):
    """OpenAI's three knobs, each a number or "auto"; null means unset."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto | None = None
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto | None = None
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | Auto | None = None

    def to_hyperparameters(self) -> Hyperparameters:
        """Return them, with "auto" for what is unset."""
        return Hyperparameters(
            **self.model_dump(exclude_none=True, include=set(HyperparametersBody.model_fields))
        )


class DpoHyperparametersBody(HyperparametersBody):
    """The three knobs, and the weight of the penalty on leaving the starting model."""

    beta: Annotated[float, Field(gt=0, le=MAX_BETA, allow_inf_nan=False)] | Auto | None = None


class DpoBody(Body):
    """Configuration of training on preferences."""

    hyperparameters: DpoHyperparametersBody | None = None


class SupervisedBody(Body):
    """Configuration of supervised training."""

    hyperparameters: HyperparametersBody | None = None


class MethodBody(Body):
    """OpenAI's `method`; clients may send all three configurations, and the one named by `type` counts."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: SupervisedBody | None = None
    dpo: DpoBody | None = None
    reinforcement: dict[str, Any] | None = None


class CreateJobBody(Body):
    """Body of POST /v1/fine_tuning/jobs. An explicit null means unset."""

    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=128)
    validation_file: str | None = Field(None, max_length=128)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=_MAX_SEED, strict=True)
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    metadata: dict[str, str] | None = None
    # At most 5, each checked by the tracker that it names (services/jobs/jobs.py).
    integrations: list[dict[str, Any]] | None = Field(None, max_length=5)
    tuning: dict[str, Any] | None = None
    training: TrainingOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        return {name: value for name, value in body.items() if name not in IGNORED_JOB_FIELDS}

    @field_validator("tuning", "training", mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Inside these too an explicit null means unset, whatever the defaults are."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    @field_validator("suffix")
    @classmethod
    def _check_suffix(cls, suffix: str | None) -> str | None:
        if suffix is not None and not all(c.isascii() and (c.isalnum() or c in "-_.") for c in suffix):
            raise ValueError("use ASCII letters, digits, '-', '_' and '.' only; it becomes part of a name.")
        return suffix

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        if metadata is None:
            return None
        if len(metadata) > 16:
            raise ValueError("at most 16 pairs are allowed.")
        if any(len(key) > 64 or len(value) > 512 for key, value in metadata.items()):
            raise ValueError("keys have at most 64 characters, values at most 512.")
        if any("\x00" in key + value for key, value in metadata.items()):
            raise ValueError("the NUL character can't be stored.")
        return metadata or None

    def to_new_job(self) -> NewJob:
        """Translate the body; its method's parameters are still to be checked.

        Raises:
            UnsupportedValueError: for what OpenAI's API has and this service does not (yet).
            InvalidValueError: when the two places of hyperparameters contradict each other.
        """
        if self.method is not None and self.method.type == "reinforcement":
            raise UnsupportedValueError(
                "method.type: 'reinforcement' is not offered: this service runs no graders and trains on no "
                "rewards. Use 'supervised' or 'dpo'; what is under `reinforcement` is then ignored.",
                param="method.type",
            )
        return NewJob(
            model=self.model,
            training_file_id=self.training_file,
            validation_file_id=self.validation_file,
            suffix=self.suffix,
            seed=secrets.randbelow(_MAX_SEED) if self.seed is None else self.seed,
            hyperparameters=self._merged_hyperparameters(),
            tuning=self.tuning or {},
            training=self.training or TrainingOptions(),
            dpo=self._dpo_options(),
            metadata=self.metadata,
            integrations=self.integrations or [],
        )

    def _dpo_options(self) -> DpoOptions | None:
        if self.method is None or self.method.type != "dpo":
            return None
        knobs = self.method.dpo.hyperparameters if self.method.dpo else None
        return DpoOptions() if knobs is None or knobs.beta is None else DpoOptions(beta=knobs.beta)

    def _merged_hyperparameters(self) -> Hyperparameters:
        config = getattr(self.method, self.method.type) if self.method else None
        inner: HyperparametersBody | None = config.hyperparameters if config else None
        outer = self.hyperparameters
        if inner is None or outer is None:
            return (inner or outer or HyperparametersBody()).to_hyperparameters()
        assert self.method is not None
        merged = inner.model_dump(include=set(HyperparametersBody.model_fields))
        for name, value in outer.model_dump().items():
            if value is not None and merged[name] is not None and merged[name] != value:
                raise InvalidValueError(
                    f"hyperparameters.{name}: {value!r} contradicts "
                    f"method.{self.method.type}.hyperparameters.{name}; send one of the two.",
                    param=f"hyperparameters.{name}",
                )
            merged[name] = value if merged[name] is None else merged[name]
        return HyperparametersBody(**merged).to_hyperparameters()


class JobObject(Answer):
    """A fine-tuning job; `started_from`, `tuning` and `training` are ours.

    Values stay "auto" until prepare has resolved them.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: Timestamp
    finished_at: Timestamp | None
    estimated_finish: Timestamp | None = Field(validation_alias="estimated_finish_at")
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    trained_tokens: int | None
    training_file: str = Field(validation_alias="training_file_id")
    validation_file: str | None = Field(validation_alias="validation_file_id")
    result_files: list[str]
    error: dict[str, Any] | None
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    seed: int
    integrations: list[Any]
    metadata: dict[str, str] | None = Field(validation_alias="user_metadata")
    user_provided_suffix: str | None = Field(validation_alias="suffix")
    started_from: dict[str, str] | None
    tuning: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def of_job(cls, job: Job) -> Self:
        """Return a job as clients see it."""
        spec = TrainingSpec.model_validate(job.spec)
        hyperparameters = spec.hyperparameters.model_dump(mode="json")
        objective = "supervised" if spec.dpo is None else "dpo"
        knobs = hyperparameters if spec.dpo is None else hyperparameters | {"beta": spec.dpo.beta}
        parent = spec.parent
        return cls.of(
            job,
            model=job.base_id,
            result_files=[] if job.result_file_id is None else [job.result_file_id],
            hyperparameters=hyperparameters,
            method={"type": objective, objective: {"hyperparameters": knobs}},
            integrations=job.integrations or [],
            started_from=None if parent is None else {"name": parent.name, "digest": parent.digest},
            tuning=spec.tuning,
            training=spec.training.model_dump(mode="json"),
        )


class EventObject(Answer):
    """An event of a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: Timestamp
    level: str
    message: str
    type: str
    data: dict[str, Any] | None


class CheckpointObject(Answer):
    """A checkpoint of a job; metrics that were not measured are absent."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: Timestamp
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str = Field(validation_alias="job_id")
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, model_name: str) -> Self:
        """Return a checkpoint as clients see it.

        Validation rows are scored all or not at all, so `valid_loss` and `full_valid_loss` are equal.
        """
        names = ("loss", "mean_token_accuracy")
        whole = {f"valid_{name}": checkpoint.metrics.get(f"full_valid_{name}") for name in names}
        measured = {name: value for name, value in whole.items() if value is not None}
        metrics = measured | checkpoint.metrics
        return cls.of(checkpoint, fine_tuned_model_checkpoint=model_name, metrics=metrics)


class JobEstimate(Estimate):
    """Answer of POST /v1/fine_tuning/jobs/estimate. Tokens are of one epoch, `trained_tokens` of all."""

    object: str = "fine_tuning.job.estimate"
    training_file: str
    validation_file: str | None


class JobReport(BaseModel):
    """GET /v1/fine_tuning/jobs/{id}/report. A part that does not exist yet is null."""

    object: Literal["fine_tuning.job.report"]
    fine_tuning_job_id: str
    prepare: PrepareReport | None = Field(description="What the files held; present once the job is queued.")
    run: RunReport | None = Field(description="What training did; updated at every evaluation.")


def report_object(job: Job) -> dict[str, Any]:
    """Return a job's report as clients see it: a JobReport, unless an older version of Luthier stored it."""
    parts = job.report or {}
    return {
        "object": "fine_tuning.job.report",
        "fine_tuning_job_id": job.id,
        "prepare": parts.get("prepare"),
        "run": parts.get("run"),
    }


class MethodObject(Answer):
    """A tuning method; `parameters` is the JSON schema of a job's `tuning`."""

    id: str = Field(validation_alias="name")
    object: Literal["fine_tuning.method"] = "fine_tuning.method"
    title: str
    parameters: dict[str, Any]
    is_whole_model: bool
    loads_in_peft: bool
