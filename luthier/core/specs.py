"""The TrainingSpec and what belongs to it: facts of the base, inputs of a run, the canary of an artifact.

The API writes the spec, prepare resolves it, worker and training process read it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SPEC_VERSION: Literal[1] = 1
# As OpenAI has it.
MIN_TRAINING_ROWS = 10

Auto = Literal["auto"]
Precision = Literal["auto", "float32", "bfloat16"]
TooLong = Literal["error", "truncate", "drop"]
SamplePrompt = Annotated[str, StringConstraints(min_length=1, max_length=4000)]


def _is_none(value: Any) -> bool:
    return value is None


class Frozen(BaseModel):
    """An immutable record that refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseFacts(Frozen):
    """What is known of a base model once it is fetched; written beside its weights as base.json.

    `digest` covers weights, configuration and tokenizer; `tokenizer_digest` the tokenizer and the chat
    template alone. Digests are `sha256:` and 64 hex digits. Lengths are in tokens.
    """

    id: str
    source: str
    licence: str
    digest: str
    tokenizer_digest: str
    context_length: int
    num_parameters: int
    num_layers: int
    hidden_size: int


class Hyperparameters(Frozen):
    """OpenAI's three knobs. `learning_rate_multiplier` scales the method's own base rate."""

    n_epochs: int | Auto = Field("auto")
    batch_size: int | Auto = Field("auto")
    learning_rate_multiplier: float | Auto = Field("auto")


class TrainingOptions(Frozen):
    """The optional `training` object of a job request; every default is a working one."""

    # JSON as it is stored knows no infinity.
    model_config = ConfigDict(allow_inf_nan=False)

    max_length: int | None = Field(
        None, ge=16, description="Longest row in tokens; the base's context length when unset."
    )
    too_long: TooLong = Field("error", description="What to do with a longer row.")
    validation_split: float = Field(
        0.0, ge=0.0, le=0.5, description="Share of rows held back for validation, chosen by content hash."
    )
    learning_rate: float | None = Field(
        None, gt=0.0, le=1.0, description="Peak rate; when set, learning_rate_multiplier is ignored."
    )
    warmup_ratio: float = Field(0.05, ge=0.0, le=0.5, description="Share of all steps with a rising rate.")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0)
    max_grad_norm: float = Field(1.0, gt=0.0, le=1000.0)
    precision: Precision = Field("auto", description="Type of the frozen weights and the products.")
    save_every_steps: int | None = Field(
        None, ge=1, description="Steps between save points; every 30 seconds when unset."
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=50,
        description="Evaluations in a row without a better validation loss after which training stops.",
    )
    keep_best: bool = Field(
        False, description="Publish the checkpoint with the lowest validation loss instead of the last."
    )
    max_forgetting: float | None = Field(
        None,
        gt=0.0,
        description="Rise of the loss on general text, in nats per token, at which training stops; the last "
        "checkpoint below it is published.",
    )
    sample_prompts: list[SamplePrompt] = Field(
        [], max_length=5, description="User messages that every checkpoint answers, shown in the report."
    )


class DpoOptions(Frozen):
    """Training on preferences (Rafailov et al. 2023, arXiv:2305.18290) instead of examples.

    `beta` weighs the distance from the model that the job starts from.
    """

    beta: float | Auto = Field("auto")


class TunedModel(Frozen):
    """A tuned model that a job builds on. `digest` is its artifact's, `name` what it was called then."""

    model_id: str
    name: str
    method: str
    digest: str


class TrainingSpec(Frozen):
    """All that decides a job's result. Stored as JSON in the job row.

    Before prepare, values may be "auto" and the facts of the rows are absent: see `is_resolved`.
    `tuning` is the method's own parameters with its `type`, checked by luthier.methods.

    `parent` is the tuned model that the job continues from, None when it starts from its base. `foundation`
    is the full model below the job's adapter instead of the base's own weights: the parent, or the
    parent's own `foundation`. A job that tunes every weight has none.
    """

    spec_version: Literal[1] = SPEC_VERSION
    base: BaseFacts | None = None
    base_id: str
    tuning: dict[str, Any]
    hyperparameters: Hyperparameters = Hyperparameters()
    training: TrainingOptions = TrainingOptions()
    seed: int
    # Threads decide the order of floating-point sums, so they are part of the spec and fixed across attempts.
    num_threads: int | None = None
    # Left out where there is none: such a spec is the same text as before there were any, so that its save
    # points and workers of the version before still know it.
    parent: TunedModel | None = Field(None, exclude_if=_is_none)
    foundation: TunedModel | None = Field(None, exclude_if=_is_none)
    # Set when the objective is dpo; the rows are then pairs.
    dpo: DpoOptions | None = Field(None, exclude_if=_is_none)

    @property
    def takes_parents_weights(self) -> bool:
        """Whether the method's own weights start as the parent's; else the parent is only the model below."""
        return self.parent is not None and self.parent != self.foundation

    @property
    def ground_digest(self) -> str | None:
        """The digest of the model below an artifact of this job, or that it was made from."""
        if self.foundation is not None:
            return self.foundation.digest
        return None if self.base is None else self.base.digest

    @property
    def is_resolved(self) -> bool:
        """Whether prepare has replaced every "auto" by a number and recorded the base."""
        values = [*self.tuning.values(), *self.hyperparameters.model_dump().values()]
        values += [] if self.dpo is None else [self.dpo.beta]
        return self.base is not None and self.num_threads is not None and "auto" not in values


class RunInputs(Frozen):
    """The run directory's inputs.json: absolute paths of what the training process reads.

    A run directory holds spec.json (TrainingSpec), inputs.json (this), train.safetensors and maybe
    validation.safetensors (luthier.data.prepare.prepared_rows); the training process adds save_points/,
    checkpoints/ and artifact/. `parent_path` and `foundation_path` are the artifacts of the spec's members of
    those names; they may be one folder.
    """

    job_id: str
    model_name: str
    base_path: str
    device: Literal["auto", "cpu", "cuda"] = "auto"
    parent_path: str | None = None
    foundation_path: str | None = None


CANARY_NAME = "canary.json"
# A larger tolerance would accept other weights.
MOST_ROUNDING = 0.25
# Another engine may be nearer to float32 than training's own path or farther from it.
_LARGEST_RATIO = 2.0


class Canary(Frozen):
    """A text and some of the logits after it.

    `logits` are those of the tokens `candidates`, the likeliest first. `precision` is the type of the weights
    that gave them; they are computed in float32 whatever it is (older records: in that type). `rounding` is
    how far off that type's own logits were in training, as the norm of the gap relative to the logits' norm,
    at most `MOST_ROUNDING`: weights that amplify it more are served in float32 alone.
    """

    token_ids: list[int]
    candidates: list[int]
    logits: list[float]
    precision: str
    rounding: float = Field(0.0, ge=0, le=MOST_ROUNDING)

    @property
    def allowed_rounding(self) -> float:
        """How far off an engine that computes in such a type may be, where that is more than usual."""
        return min(_LARGEST_RATIO * self.rounding, MOST_ROUNDING)
