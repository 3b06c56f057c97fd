"""Estimates of jobs: resolved parameters, seconds and bytes.

Seconds come from finished jobs on the base, or, before the first, from the measured speed of a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from luthier.core.cost_model import (
    NUMBER_BYTES,
    DeviceSpeed,
    FinishedJob,
    MethodCost,
    Work,
    max_part_tokens,
    peak_bytes,
    predict_seconds,
)
from luthier.core.events import PhaseSeconds
from luthier.core.shapes import BaseShape
from luthier.core.specs import (
    MIN_TRAINING_ROWS,
    Auto,
    BaseFacts,
    Frozen,
    Hyperparameters,
    Precision,
    TrainingOptions,
    TrainingSpec,
)
from luthier.data.prepare.row_counts import RowCounts
from luthier.methods import Method
from luthier.methods._tuning import parse_tuning, resolve_spec

# As training has it: weights of adapters are float32, whole models in the type that was trained in.
_ADAPTER_NUMBER_BYTES = 4
# Of a base's folder, what no artifact of a whole model takes over.
_NOT_TAKEN_OVER = (".safetensors", "base.json", "manifest.json")


@dataclass(frozen=True)
class Grounds:
    """What seconds rest on: the device, and jobs that finished on it, the newest first."""

    device: DeviceSpeed
    finished: Sequence[FinishedJob] = ()


class EstimateRows(Frozen):
    """Rows of the training file; of a sample all but `total` and `counted` are shares of the whole."""

    total: int
    counted: int = Field(description="Rows whose tokens were counted one by one.")
    is_sampled: bool
    train: int
    validation: int
    too_long: int = Field(description="Longer than training.max_length.")
    faulty: int = Field(description="Refused by the base's template, or without a supervised token.")


class EstimateSeconds(Frozen):
    """Seconds of the training process by phase."""

    total: float
    load: float
    train: float
    evaluate: float
    save: float


class EstimateBasis(Frozen):
    """What seconds and memory are computed from."""

    device: str
    precision: str
    num_threads: int
    finished_jobs: int = Field(
        description="Finished jobs on this base and device; 0: only the device was measured."
    )


class Estimate(Frozen):
    """What a job would take. Tokens are of one epoch, `trained_tokens` of all.

    A row of preferences has the tokens of both its conversations, the prompt's twice.
    """

    spec: TrainingSpec = Field(exclude=True)
    model: str
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


@dataclass(frozen=True)
class MemoryNeed:
    """Of a training process: what it takes at its peak, and with the smallest micro-batch."""

    peak_bytes: int
    least_bytes: int


def estimate(
    spec: TrainingSpec,
    *,
    base: BaseFacts,
    shape: BaseShape,
    base_folder: Path,
    training: RowCounts,
    validation: RowCounts | None,
    grounds: Grounds | None,
    memory_bytes: int | None,
) -> Estimate:
    """Estimate a job's steps, tokens, seconds and bytes; no seconds without `grounds` (a measured device)."""
    num_held_back = _num_held_back(spec.training.validation_split, training.num_kept)
    num_train_rows = training.num_kept - num_held_back
    share = num_train_rows / max(1, training.num_examples)
    num_tokens = round(training.num_tokens * share)
    resolved = resolve_spec(
        spec,
        base=base,
        num_rows=num_train_rows,
        num_tokens=num_tokens,
        num_threads=grounds.device.num_threads if grounds else 1,
        memory_bytes=memory_bytes,
    )
    method, params = parse_tuning(resolved.tuning)
    cost = method.cost(params, shape)
    epochs, batch_size = resolved.hyperparameters.n_epochs, resolved.hyperparameters.batch_size
    assert isinstance(epochs, int)
    assert isinstance(batch_size, int)
    precision = _precision(spec.training.precision, grounds)
    artifact_bytes = _artifact_bytes(method, cost, precision, base_folder)
    num_steps = -(-num_train_rows // batch_size) * epochs
    num_supervised = round(training.num_supervised * share)
    seconds, peak = None, None
    if grounds is not None and precision is not None and artifact_bytes is not None and num_train_rows > 0:
        num_scored = (
            validation.num_tokens * validation.scale
            if validation
            else num_held_back * num_tokens / num_train_rows
        )
        num_together = 1 if spec.dpo is None else 2
        work = Work(
            is_whole_model=method.is_whole_model,
            num_tokens=(num_tokens + cost.num_virtual_tokens * num_train_rows * num_together) * epochs,
            num_supervised_tokens=num_supervised * epochs,
            num_steps=num_steps,
            num_epochs=epochs,
            num_evaluations=epochs + (1 if spec.parent is None else 2),
            num_scored_tokens=round(num_scored),
            num_prompts=len(spec.training.sample_prompts),
            num_reference_tokens=0 if spec.dpo is None else num_tokens + round(num_scored),
            num_parameters=cost.num_parameters,
            artifact_bytes=artifact_bytes,
        )
        seconds = predict_seconds(
            work,
            method=method.name,
            has_pairs=training.has_pairs,
            shape=shape,
            flops=grounds.device.product_flops.get(precision, 1e11),
            finished=grounds.finished,
        )
        peak = need_memory(
            resolved,
            base=base,
            shape=shape,
            longest=training.longest,
            device=grounds.device.device,
            precision=precision,
        ).peak_bytes
    return Estimate(
        spec=resolved,
        model=resolved.base_id,
        rows=EstimateRows(
            total=training.num_rows,
            counted=training.num_read,
            is_sampled=training.num_read < training.num_rows,
            train=num_train_rows,
            validation=validation.num_kept if validation else num_held_back,
            too_long=round(training.num_too_long * training.scale),
            faulty=round(training.num_faulty * training.scale),
        ),
        tokens=num_tokens,
        supervised_tokens=num_supervised,
        trained_tokens=num_tokens * epochs,
        steps=num_steps,
        hyperparameters=resolved.hyperparameters,
        beta=None if resolved.dpo is None else resolved.dpo.beta,
        tuning=resolved.tuning,
        training=resolved.training,
        num_trained_parameters=cost.num_parameters,
        artifact_bytes=artifact_bytes,
        seconds=None if seconds is None else _in_phases(seconds),
        peak_memory_bytes=peak,
        basis=_basis(grounds) if grounds and seconds else None,
        reason=None if seconds else _reason(grounds, num_train_rows),
        warnings=_warnings(spec.training.max_length, resolved, training, num_train_rows, cost, base),
    )


def _in_phases(seconds: PhaseSeconds) -> EstimateSeconds:
    phases = seconds.model_dump(exclude={"tokenize"})
    rounded = {name: round(value, 2) for name, value in phases.items()}
    return EstimateSeconds(total=round(sum(phases.values()), 2), **rounded)


def _basis(grounds: Grounds) -> EstimateBasis:
    device = grounds.device
    return EstimateBasis(
        device=device.device,
        precision=device.precision,
        num_threads=device.num_threads,
        finished_jobs=len(grounds.finished),
    )


def need_memory(
    spec: TrainingSpec, *, base: BaseFacts, shape: BaseShape, longest: int, device: str, precision: str
) -> MemoryNeed:
    """Return the memory that a job's training process needs; `longest` is the tokens of the longest row."""
    method, params = parse_tuning(spec.tuning)
    cost = method.cost(params, shape)
    batch_size = spec.hyperparameters.batch_size
    assert isinstance(batch_size, int), "the spec is resolved"
    num_together = 1 if spec.dpo is None else 2
    smallest = (longest + cost.num_virtual_tokens) * num_together
    largest = min(batch_size * smallest, max(smallest, max_part_tokens(base, device)))

    def peak(num_tokens: int) -> int:
        return peak_bytes(
            cost,
            shape,
            device=device,
            precision=precision,
            is_whole_model=method.is_whole_model,
            num_tokens=num_tokens,
            longest=longest,
        )

    return MemoryNeed(peak(largest), peak(smallest))


def _precision(asked: Precision, grounds: Grounds | None) -> str | None:
    """Return the type that a job trains in; None where that depends on a device that is not known."""
    if asked != "auto":
        return asked
    return None if grounds is None else grounds.device.precision


def _reason(grounds: Grounds | None, num_train_rows: int) -> str:
    if grounds is None:
        return "No worker has measured its device yet; each does so when it starts."
    return "No row is left to train on." if num_train_rows <= 0 else "The artifact's size is not known."


def _num_held_back(share: float, num_rows: int) -> int:
    return max(1, round(share * num_rows)) if share > 0 and num_rows > 1 else 0


def _artifact_bytes(method: Method, cost: MethodCost, precision: str | None, base_folder: Path) -> int | None:
    """Return the size of one artifact; None for a whole model where no device says in which type it is."""
    if not method.is_whole_model:
        return cost.num_saved * _ADAPTER_NUMBER_BYTES
    if precision is None:
        return None
    taken_over = [path for path in base_folder.iterdir() if not path.name.endswith(_NOT_TAKEN_OVER)]
    return cost.num_saved * NUMBER_BYTES[precision] + sum(
        path.stat().st_size for path in taken_over if path.is_file()
    )


def limit_warning(asked: int | None, resolved: TrainingSpec) -> str:
    """Return that rows may be no longer than the base has room for; empty where they may be as asked."""
    limit = resolved.training.max_length
    if asked is None or limit is None or asked <= limit:
        return ""
    return (
        f"training.max_length is {limit}, not {asked}: the base's context has no more room for a row "
        "(virtual tokens take some of it)."
    )


def _warnings(
    asked_max_length: int | None,
    spec: TrainingSpec,
    training: RowCounts,
    num_train_rows: int,
    cost: MethodCost,
    base: BaseFacts,
) -> list[str]:
    """Say what would end the job, or change it, as far as it was counted."""
    found: list[str] = []
    limit, too_long = spec.training.max_length, spec.training.too_long
    cut_limit = limit_warning(asked_max_length, spec)
    if cut_limit:
        found.append(cut_limit)
    if training.num_faulty:
        found.append(
            f"{training.num_faulty} of the {training.num_read} rows counted can't be trained on: the base's "
            "template refuses them or nothing in them is supervised. The job would fail and name their lines."
        )
    if training.num_too_long:
        what = {
            "error": "The job would fail and name their lines",
            "truncate": "They would be cut",
            "drop": "They would be left out",
        }[too_long]
        found.append(
            f"{training.num_too_long} of the {training.num_read} rows counted have more than {limit} tokens. "
            f"{what} (training.too_long)."
        )
    if num_train_rows < MIN_TRAINING_ROWS:
        found.append(f"{num_train_rows} rows are left to train on; a job needs {MIN_TRAINING_ROWS}.")
    if training.is_first_rows:
        found.append(
            f"The file is packed or large: its first {training.num_read} rows were counted as a sample."
        )
    num_virtual = cost.num_virtual_tokens + cost.num_virtual_keys
    longest = training.longest
    if longest + num_virtual > base.context_length:
        found.append(
            f"The longest row counted has {longest} tokens, which with {num_virtual} virtual ones are more "
            f"than the base's {base.context_length} positions. The job would fail."
        )
    return found
