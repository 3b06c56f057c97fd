"""Events and the report of a training job.

The training process writes one event a line, a JSON object with its job id, on its standard output; the
worker reads them with `parse_event`, turns them into job_events and keeps the report in the job row.
Losses are mean negative log-likelihoods in nats per supervised token, accuracies are shares of supervised
tokens whose likeliest prediction is right, sizes are in bytes, times in seconds.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from luthier.core.specs import Frozen, TrainingSpec


class SampleAnswer(Frozen):
    """What a model answers to one of `training.sample_prompts`, greedily, cut at a fixed length."""

    prompt: str
    answer: str


class Evaluation(Frozen):
    """Scores of the model after a step; step 0 is the start: the base, or a tuned model.

    `valid_*` are over the validation rows, absent without any; the rewards are those of dpo
    (luthier.core.events.Metrics). `general_loss` is over the bundled general text; `forgetting` is that
    after minus that at step 0.
    """

    step: int
    epoch: float
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    valid_reward_accuracy: float | None = None
    valid_reward_margin: float | None = None
    general_loss: float | None = None
    forgetting: float | None = None
    answers: list[SampleAnswer] = Field([])

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the model itself, by name."""
        measured = {"valid_loss", "valid_mean_token_accuracy", "general_loss"}
        found: dict[str, float] = self.model_dump(include=measured, exclude_none=True)
        return found


class PhaseSeconds(Frozen):
    """Seconds that all attempts together spent in each phase."""

    load: float = 0.0
    tokenize: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    save: float = 0.0


class StartedFrom(Frozen):
    """The tuned model that a job continued from: its name when the job was made, its artifact's digest."""

    name: str
    digest: str


class RunReport(Frozen):
    """The training child's part of a job's report, complete at every evaluation.

    `path` is the code that ran the layers: fused or plain. `stopped_early` is why training ended before its
    last step. `result_step` is the step whose weights became the model. `full_copy_bytes` is what the
    same model would take as a whole copy of the base in the type that it was trained in. `started_from` and
    `base_evaluation`, the untuned base's scores, exist for jobs that continued from a tuned model.
    """

    method: str
    path: str
    device: str
    precision: str
    num_threads: int
    num_trained_parameters: int
    num_base_parameters: int
    artifact_bytes: int | None = None
    full_copy_bytes: int
    evaluations: list[Evaluation] = Field([])
    started_from: StartedFrom | None = None
    base_evaluation: Evaluation | None = None
    steps_done: int = 0
    steps_planned: int
    result_step: int | None = None
    stopped_early: str | None = None
    micro_batch_halvings: int = 0
    seconds: PhaseSeconds = PhaseSeconds()
    tokens_seen: int = 0
    supervised_tokens_seen: int = 0
    tokens_per_second: float | None = None
    peak_memory_bytes: int = 0
    base_digest: str
    data_sha256: str
    validation_sha256: str | None = None
    artifact_digest: str | None = None
    versions: dict[str, str] = Field({})
    seed: int
    spec: TrainingSpec


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    job_id: str


class Metrics(BaseModel):
    """Scores at one step. What was not measured is absent, never null on the wire.

    Rewards are those of dpo: how much likelier an answer has become than it was at the start, in nats,
    times beta. The margin is that of the preferred answer minus the other's, the accuracy the share of
    pairs in which it is above 0; a tie counts half.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None
    train_reward_accuracy: float | None = None
    train_reward_margin: float | None = None
    full_valid_reward_accuracy: float | None = None
    full_valid_reward_margin: float | None = None


class StartedEvent(_Event):
    """The base is loaded and the method attached; `start_step` is above 0 when a save point was resumed."""

    type: Literal["started"] = "started"
    device: str
    precision: str
    start_step: int
    total_steps: int
    num_trained_parameters: int
    load_seconds: float


class StepEvent(_Event):
    """One optimizer step is done. `num_tokens` counts the step's real tokens, padding not included."""

    type: Literal["step"] = "step"
    step: int
    total_steps: int
    epoch: float
    metrics: Metrics
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_supervised_tokens: int
    tokens_per_second: float
    seconds_left: float
    peak_memory_bytes: int


class EvaluatedEvent(_Event):
    """The model was scored after a step, step 0 being the base; `report` is the whole so far."""

    type: Literal["evaluated"] = "evaluated"
    evaluation: Evaluation
    report: RunReport


class SavePointEvent(_Event):
    """A save point is durable under `path`, relative to the run directory."""

    type: Literal["save_point"] = "save_point"
    step: int
    path: str


class CheckpointEvent(_Event):
    """An artifact folder is complete under `path`, relative to the run directory; its reader takes it."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    path: str
    digest: str
    metrics: Metrics


class FinishedEvent(_Event):
    """Training is over and the checkpoint of `step` is the result, complete under `path`."""

    type: Literal["finished"] = "finished"
    step: int
    path: str
    digest: str
    metrics: Metrics
    trained_tokens: int
    num_trained_parameters: int
    seconds: float
    report: RunReport


class StoppedEvent(_Event):
    """Training stopped by TERM after finishing a step and writing a save point."""

    type: Literal["stopped"] = "stopped"
    step: int


class ProgressEvent(_Event):
    """Progress within a step or an evaluation; sent at intervals, not shown to users."""

    type: Literal["progress"] = "progress"


class MessageEvent(_Event):
    """A sentence for the user, such as that a damaged save point was skipped."""

    type: Literal["message"] = "message"
    level: Literal["info", "warn", "error"]
    message: str


class FailedEvent(_Event):
    """The run can't succeed; `code` is that of a luthier.core.errors.JobError."""

    type: Literal["failed"] = "failed"
    code: str
    message: str
    param: str | None = None
    # False: another attempt would end the same way.
    is_retryable: bool = False


TrainingEvent = Annotated[
    StartedEvent
    | StepEvent
    | EvaluatedEvent
    | SavePointEvent
    | CheckpointEvent
    | FinishedEvent
    | StoppedEvent
    | ProgressEvent
    | MessageEvent
    | FailedEvent,
    Field(discriminator="type"),
]

_ADAPTER: TypeAdapter[TrainingEvent] = TypeAdapter(TrainingEvent)


def parse_event(line: bytes | str) -> TrainingEvent:
    """Read one line of the child's standard output.

    Raises:
        pydantic.ValidationError: when the line is no event.
    """
    return _ADAPTER.validate_json(line)
