"""What a job reports beside its events: how the model changed, what it cost, what it was made from.

The training child builds it, the worker keeps it in the job row, `GET …/jobs/{id}/report` serves it.
Losses are nats per token, accuracies shares, sizes bytes, times seconds.
"""

from pydantic import Field

from luthier.core.specs import Frozen, TrainingSpec


class SampleAnswer(Frozen):
    """What a model answers to one of `training.sample_prompts`, greedily, cut at a fixed length."""

    prompt: str
    answer: str


class Evaluation(Frozen):
    """Scores of the model after a step; step 0 is what the job started from: the base, or a tuned model.

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
        """What was measured of the model itself, by name."""
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
    """The tuned model that a job went on from: its name when the job was made, its artifact's digest."""

    name: str
    digest: str


class RunReport(Frozen):
    """The training child's part of a job's report, complete at every evaluation.

    `path` is the code that ran the layers: fused or plain. `stopped_early` says why training ended before
    its last step. `result_step` is the step whose weights became the model. `full_copy_bytes` is what the
    same model would take as a whole copy of the base in the type that it was trained in. `started_from` and
    `base_evaluation`, the untuned base's scores, are there for jobs that went on from a tuned model.
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
