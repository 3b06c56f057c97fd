"""Reading a run directory: what is to be trained, on what, how."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from luthier.core.errors import InvalidTrainingFileError, InvalidValueError, LuthierError
from luthier.core.specs import RunInputs, TrainingOptions, TrainingSpec
from luthier.data.prepare.batch_plan import Plan, make_plan
from luthier.data.prepare.preference_pairs import make_pair_plan
from luthier.data.prepare.prepared_rows import PreparedRows, read_prepared
from luthier.storage.manifests import file_sha256
from luthier.training.model.batches import count_supervised, row_lengths
from luthier.training.output.artifact import Origin

SPEC_NAME = "spec.json"
INPUTS_NAME = "inputs.json"
TRAIN_NAME = "train.safetensors"
VALIDATION_NAME = "validation.safetensors"


@dataclass(frozen=True)
class Job:
    """A run directory's content and the plan that follows from it.

    `fingerprint` names spec and rows: two attempts with the same one do the same work. The hashes are of
    the prepared rows, 64 hex digits.
    """

    folder: Path
    origin: Origin
    rows: PreparedRows
    validation: PreparedRows | None
    plan: Plan
    fingerprint: str
    data_sha256: str
    validation_sha256: str | None

    @property
    def spec(self) -> TrainingSpec:
        return self.origin.spec

    @property
    def peak_learning_rate(self) -> float:
        """The highest rate, as resolved."""
        rate = self.spec.training.learning_rate
        if rate is None:
            raise LuthierError("The spec holds no learning rate; it must be resolved before training.")
        return rate

    def lines_of(self, step: int) -> list[int]:
        """Return the lines of the training file that a step trains on, sorted."""
        return sorted({int(line) for line in self.rows.lines[self.plan.steps[step - 1]]})


def read_inputs(folder: Path) -> RunInputs:
    return RunInputs.model_validate_json((folder / INPUTS_NAME).read_bytes())


def read_job(folder: Path, inputs: RunInputs) -> Job:
    """Read the rest of a run directory and settle the plan.

    Raises:
        LuthierError: when the spec is not resolved.
        InvalidTrainingFileError: when no token is supervised.
        InvalidValueError: when an option needs validation rows and there are none.
    """
    spec_text = (folder / SPEC_NAME).read_bytes()
    spec = TrainingSpec.model_validate_json(spec_text)
    epochs, batch_size = spec.hyperparameters.n_epochs, spec.hyperparameters.batch_size
    if not spec.is_resolved or spec.base is None or isinstance(epochs, str) or isinstance(batch_size, str):
        raise LuthierError('The spec still holds "auto" values; it must be resolved before training.')
    rows = read_prepared(folder / TRAIN_NAME)
    if rows.num_rows == 0 or int(count_supervised(rows).sum()) == 0:
        raise InvalidTrainingFileError(
            "No token of the training file is supervised: there is nothing to learn from. "
            "Rows need an assistant message with content and a weight other than 0.",
            param="training_file",
        )
    validation_path = folder / VALIDATION_NAME
    validation = read_prepared(validation_path) if validation_path.exists() else None
    if validation is not None and (validation.num_rows == 0 or count_supervised(validation).sum() == 0):
        validation = None
    _check_options(spec.training, has_validation=validation is not None)
    data_sha256 = file_sha256(folder / TRAIN_NAME)
    validation_sha256 = None if validation is None else file_sha256(validation_path)
    # Validation decides when to stop and what is published, so its rows are part of what is trained.
    make = make_plan if spec.dpo is None else make_pair_plan
    names = f"{spec.model_dump_json()}{data_sha256}{validation_sha256}".encode()
    return Job(
        folder=folder,
        origin=Origin(inputs=inputs, spec=spec, base=spec.base),
        rows=rows,
        validation=validation,
        plan=make(row_lengths(rows), batch_size=batch_size, num_epochs=epochs, seed=spec.seed),
        fingerprint=hashlib.sha256(names).hexdigest(),
        data_sha256=data_sha256,
        validation_sha256=validation_sha256,
    )


def _check_options(options: TrainingOptions, *, has_validation: bool) -> None:
    """Refuse what is decided by a validation loss where there will be none."""
    for name, is_asked in (("patience", options.patience is not None), ("keep_best", options.keep_best)):
        if is_asked and not has_validation:
            raise InvalidValueError(
                f"training.{name} needs validation rows with supervised tokens. Send a validation_file, or "
                "set training.validation_split.",
                param=f"training.{name}",
            )
