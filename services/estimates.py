"""What a job would take: the numbers that "auto" becomes, and seconds and bytes where a worker has measured.

Nothing is guessed: without a calibration (services.calibrations) there are no seconds.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.core.estimates import Calibration, MethodCost
from luthier.core.pricing import Part, Price, Pricing, Scoring, Work
from luthier.core.reports import PhaseSeconds
from luthier.core.shapes import BaseShape
from luthier.core.specs import MIN_TRAINING_ROWS, BaseFacts, Precision, TrainingSpec
from luthier.data.count import RowCounts
from luthier.data.pairs import order_pairs, split_pairs
from luthier.data.plan import order_epoch, split_micro
from luthier.methods import Method, parse_tuning, resolve_spec
from services.calibrations import Measured

# As training has it: weights of adapters are float32, whole models in the type that was trained in.
_ADAPTER_NUMBER_BYTES = 4
_NUMBER_BYTES = {"float32": 4, "bfloat16": 2}
# Of a base's folder, what no artifact of a whole model takes over.
_NOT_TAKEN_OVER = (".safetensors", "base.json", "manifest.json")
# A trained output layer's loss is three products of matrices; that of a pair makes its logits once more for
# the gradient (luthier.training.token_loss).
_PAIR_HEAD_SCALE = 4 / 3
# Validation rows beyond are scored in time that grows with their number alone.
_MAX_VALIDATION_ROWS = 50_000


@dataclass(frozen=True)
class Estimate:
    """What a job would take. Tokens are of one epoch unless their name says otherwise; rows are of the file.

    A row of preferences has the tokens of both its conversations, the prompt's twice.

    `seconds` and `peak_memory_bytes` are None without a calibration, and `reason` says why there is none.
    """

    spec: TrainingSpec
    num_rows: int
    num_counted: int
    num_train_rows: int
    num_validation_rows: int
    num_too_long: int
    num_faulty: int
    num_tokens: int
    num_supervised_tokens: int
    num_trained_tokens: int
    num_steps: int
    num_trained_parameters: int
    artifact_bytes: int | None
    seconds: PhaseSeconds | None
    peak_memory_bytes: int | None
    measured: Measured | None
    reason: str | None
    warnings: list[str] = field(default_factory=list)


def estimate(
    spec: TrainingSpec,
    *,
    base: BaseFacts,
    shape: BaseShape,
    base_folder: Path,
    training: RowCounts,
    validation: RowCounts | None,
    measured: Measured | None,
    reason: str,
    memory_bytes: int | None,
) -> Estimate:
    """Tell what a job would take.

    Args:
        spec: as the request made it.
        base_folder: where it lies.
        validation: the validation file's, if there is one.
        memory_bytes: memory of the training device, where it is known.

    Raises:
        InvalidRequestError: when a parameter does not fit the base.
    """
    num_held_back = _num_held_back(spec.training.validation_split, training.num_kept)
    num_train_rows = training.num_kept - num_held_back
    share = num_train_rows / max(1, training.num_examples)
    num_tokens = round(int(training.lengths.sum()) * share)
    resolved = resolve_spec(
        spec,
        base=base,
        num_rows=num_train_rows,
        num_tokens=num_tokens,
        num_threads=measured.constants.num_threads if measured else 1,
        memory_bytes=memory_bytes,
    )
    method, params = parse_tuning(resolved.tuning)
    cost = method.cost(params, shape)
    epochs, batch_size = resolved.hyperparameters.n_epochs, resolved.hyperparameters.batch_size
    assert isinstance(epochs, int)
    assert isinstance(batch_size, int)
    artifact_bytes = _artifact_bytes(method, cost, spec.training.precision, base_folder, measured)
    num_steps = -(-num_train_rows // batch_size) * epochs
    price = None
    if measured is not None and cost.variant not in measured.constants.variants:
        measured, reason = None, f"The worker's probe had no time left to measure {cost.variant}."
    if measured is not None and artifact_bytes is not None and num_train_rows > 0:
        constants = measured.constants
        pricing = Pricing(
            constants,
            cost,
            shape.num_layers,
            shape.hidden_size,
            shape.vocabulary_size,
            artifact_bytes,
            method.is_whole_model,
        )
        rows_scored = _rows_scored(training, validation, num_held_back, constants)
        price = _price(pricing, resolved, training, num_steps, epochs, batch_size, rows_scored)
    return Estimate(
        spec=resolved,
        num_rows=training.num_rows,
        num_counted=training.num_read,
        num_train_rows=num_train_rows,
        num_validation_rows=validation.num_kept if validation else num_held_back,
        num_too_long=round(training.num_too_long * training.scale),
        num_faulty=round(training.num_faulty * training.scale),
        num_tokens=num_tokens,
        num_supervised_tokens=round(int(training.supervised.sum()) * share),
        num_trained_tokens=num_tokens * epochs,
        num_steps=num_steps,
        num_trained_parameters=cost.num_parameters,
        artifact_bytes=artifact_bytes,
        seconds=price.seconds if price else None,
        peak_memory_bytes=price.peak_memory_bytes if price else None,
        measured=measured if price else None,
        reason=None if price else reason or "No row is left to train on.",
        warnings=_warnings(spec.training.max_length, resolved, training, num_train_rows, cost, base),
    )


def _price(
    pricing: Pricing,
    spec: TrainingSpec,
    training: RowCounts,
    num_steps: int,
    epochs: int,
    batch_size: int,
    rows_scored: list[Part],
) -> Price:
    constants = pricing.calibration
    order = order_pairs if training.has_pairs else order_epoch
    steps = [
        _parts(training, rows, constants.max_part_tokens)
        for rows in order(training.lengths, batch_size, spec.seed, 0)
    ]
    general = _general(constants)
    once: list[Scoring] = []
    if spec.parent is not None:
        # The base of a job that goes on; pairs are scored beside what the job starts from alone.
        once.append(Scoring(general if training.has_pairs else general + rows_scored))
    if training.has_pairs:
        all_rows = _parts(training, np.arange(len(training.lengths)), constants.max_part_tokens)
        times = num_steps / epochs / len(steps)
        once.append(Scoring(all_rows, times, is_tuned=spec.takes_parents_weights))
        once.append(Scoring(rows_scored, is_tuned=spec.takes_parents_weights))
    work = Work(
        steps=steps,
        scale=num_steps / len(steps),
        num_steps=num_steps,
        num_epochs=epochs,
        scored=general + rows_scored,
        num_prompts=len(spec.training.sample_prompts),
        longest=int(training.lengths.max()),
        save_every_steps=spec.training.save_every_steps,
        num_first_answered=1 if spec.parent is None else 2,
        num_read=2 if spec.parent is not None and (spec.foundation or pricing.is_whole_model) else 1,
        once=once,
        head_scale=_PAIR_HEAD_SCALE if training.has_pairs and pricing.is_whole_model else 1.0,
    )
    return pricing.price(work)


def _parts(counts: RowCounts, rows: NDArray[np.int64], max_tokens: int) -> list[Part]:
    lengths, supervised = counts.lengths, counts.supervised
    split = split_pairs if counts.has_pairs else split_micro
    return [
        Part(len(part), int(lengths[part].max()), int(supervised[part].sum()), _num_shared(counts, part))
        for part in split(rows, lengths, max_tokens)
    ]


def _num_shared(counts: RowCounts, rows: NDArray[np.int64]) -> int:
    """Return the tokens that rows which run together begin with; two rows of pairs are one pair."""
    if counts.pair_shared is not None and len(rows) == 2:
        return int(counts.pair_shared[rows[0] // 2])
    return counts.num_shared


def _general(constants: Calibration) -> list[Part]:
    """Return the parts of the bundled text, all but first tokens scored."""
    lengths = np.array(constants.general_lengths, dtype=np.int64)
    num_rows = len(lengths)
    counts = RowCounts(lengths, lengths - 1, num_rows, num_rows, 0, 0)
    return _parts(counts, np.arange(num_rows), constants.max_part_tokens)


def _rows_scored(
    training: RowCounts, validation: RowCounts | None, num_held_back: int, constants: Calibration
) -> list[Part]:
    """Return the parts of the validation rows."""
    counts, num_examples = (
        (training, num_held_back) if validation is None else (validation, validation.num_kept)
    )
    num_rows = min(num_examples, _MAX_VALIDATION_ROWS) * (2 if counts.has_pairs else 1)
    if not num_rows or not len(counts.lengths):
        return []
    lengths, supervised = (np.resize(one, num_rows) for one in (counts.lengths, counts.supervised))
    of_pairs = None if counts.pair_shared is None else np.resize(counts.pair_shared, num_rows // 2)
    counts = replace(counts, lengths=lengths, supervised=supervised, pair_shared=of_pairs)
    return _parts(counts, np.arange(num_rows), constants.max_part_tokens)


def _num_held_back(share: float, num_rows: int) -> int:
    return max(1, round(share * num_rows)) if share > 0 and num_rows > 1 else 0


def _artifact_bytes(
    method: Method, cost: MethodCost, precision: Precision, base_folder: Path, measured: Measured | None
) -> int | None:
    """Return the size of one artifact; None for a whole model of which no worker says in which type it is."""
    if not method.is_whole_model:
        return cost.num_saved * _ADAPTER_NUMBER_BYTES
    size = measured.constants.bytes_per_number if measured else _NUMBER_BYTES.get(precision)
    if size is None:
        return None
    taken_over = [path for path in base_folder.iterdir() if not path.name.endswith(_NOT_TAKEN_OVER)]
    return cost.num_saved * size + sum(path.stat().st_size for path in taken_over if path.is_file())


def tell_limit(asked: int | None, resolved: TrainingSpec) -> str:
    """Return that rows may be no longer than the base has room for; empty where they may be as asked.

    Args:
        asked: `training.max_length` of the request.
    """
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
    cut_limit = tell_limit(asked_max_length, spec)
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
    num_virtual = cost.num_virtual_tokens + cost.num_virtual_keys
    longest = int(training.lengths.max()) if len(training.lengths) else 0
    if longest + num_virtual > base.context_length:
        found.append(
            f"The longest row counted has {longest} tokens, which with {num_virtual} virtual ones are more "
            f"than the base's {base.context_length} positions. The job would fail."
        )
    return found
