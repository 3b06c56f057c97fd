"""What the training child says, one JSON object a line on its standard output, each with its job id.

The worker reads them with `parse_event` and turns them into job_events. Losses are mean negative
log-likelihoods in nats per supervised token; accuracies are shares of supervised tokens whose most
likely prediction is right; sizes are in bytes, times in seconds.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from luthier.core.reports import Evaluation, RunReport


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
    """TERM was honoured: the step was finished and a save point written."""

    type: Literal["stopped"] = "stopped"
    step: int


class ProgressEvent(_Event):
    """Work goes on within a step or an evaluation; sent now and then, and of no interest to users."""

    type: Literal["progress"] = "progress"


class MessageEvent(_Event):
    """A sentence for the user, such as a save point that was damaged and skipped."""

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
